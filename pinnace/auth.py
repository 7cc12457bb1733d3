"""Who is answered more than probes: those who show one of the keys, and, where a CA is named, a certificate."""

from __future__ import annotations

import hashlib
import hmac

from pinnace.errors import ConfigurationError, Unauthenticated, one_line
from pinnace.settings import Settings


class Authenticator:
    """What --api_key_file and --ssl_ca_certs ask of clients; everybody is welcome without them."""

    def __init__(self, settings: Settings) -> None:
        """Raises BadSetting."""
        self.requires_client_certificate = settings.ssl_ca_certs is not None
        self._digests: list[bytes] = []
        if settings.api_key_file:
            try:
                keys = settings.api_key_file.read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"--api_key_file cannot be read: {one_line(error)}") from None
            if not keys:
                raise ConfigurationError(f"--api_key_file: {settings.api_key_file} holds no key")
            self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str, has_certificate: bool) -> None:
        """The header's value, empty where there is none. Raises Unauthenticated."""
        if self.requires_client_certificate and not has_certificate:
            raise Unauthenticated("a client certificate is needed")
        scheme, _, key = authorization.partition(" ")
        if self._digests and not (scheme.lower() == "bearer" and self._is_valid_key(key.strip())):
            raise Unauthenticated("a key is needed: send it as Authorization: Bearer KEY")

    def _is_valid_key(self, key: str) -> bool:
        """In a time that depends neither on the key nor on which it equals."""
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
