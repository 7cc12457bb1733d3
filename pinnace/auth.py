"""Authentication: API keys and client certificates. Probes are always public."""

from __future__ import annotations

import hashlib
import hmac

from pinnace.errors import ConfigurationError, Unauthenticated, one_line
from pinnace.settings import Settings


class Authenticator:
    """The checks that --api_key_file and --ssl_ca_certs require; without these flags every request passes."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys. Raises ConfigurationError if --api_key_file cannot be read or is empty."""
        self.requires_client_certificate = settings.ssl_ca_certs is not None
        self._digests: list[bytes] = []
        if settings.api_key_file:
            try:
                keys = settings.api_key_file.read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"--api_key_file cannot be read: {one_line(error)}") from None
            if not keys:
                raise ConfigurationError(f"--api_key_file={settings.api_key_file} contains no key")
            self._digests = [_digest(key) for key in keys]

    @property
    def is_required(self) -> bool:
        """Return whether any request needs a key or a certificate."""
        return self.requires_client_certificate or bool(self._digests)

    def check(self, authorization: str, has_certificate: bool) -> None:
        """Raise Unauthenticated unless the request may pass.

        Args:
            authorization: The value of the Authorization header; empty if the request has none.
            has_certificate: Whether the client presented a certificate that --ssl_ca_certs verifies.
        """
        if self.requires_client_certificate and not has_certificate:
            raise Unauthenticated("a client certificate is required")
        scheme, _, key = authorization.partition(" ")
        if self._digests and not (scheme.lower() == "bearer" and self._is_valid_key(key.strip())):
            raise Unauthenticated("an API key is required: send it as 'Authorization: Bearer KEY'")

    def _is_valid_key(self, key: str) -> bool:
        """Compare the key with all known keys, in constant time."""
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
