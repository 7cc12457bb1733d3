"""Authentication: API keys and client certificates. Probes are always public."""

from __future__ import annotations

import codecs
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from pinnace.errors import ConfigurationError, Unauthenticated
from pinnace.settings import Settings


class Authenticator:
    """The checks that --api_key_file and --ssl_ca_certs require; without these flags every request passes."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys. Raises ConfigurationError if --api_key_file cannot be read, is invalid or has no key."""
        self.requires_client_certificate = settings.ssl_ca_certs is not None
        keys = _read_keys(settings.api_key_file) if settings.api_key_file else []
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


def _read_keys(file: Path) -> Sequence[str]:
    """Return the keys of a file, one per line without the white space around it. Skip comments and empty lines.

    Errors name the line, and never contain the key. Raises ConfigurationError.
    """
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigurationError(f"--api_key_file={file} cannot be read: {error.strerror}") from None
    keys = []
    for number, line in enumerate(content.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith(b"#"):
            continue
        if len(key.split()) > 1:
            raise ConfigurationError(f"--api_key_file={file}, line {number}: a key must not contain a blank")
        if not all(0x21 <= character <= 0x7E for character in key):
            raise ConfigurationError(f"--api_key_file={file}, line {number}: a key must be of visible ASCII characters")
        keys.append(key.decode())
    if not keys:
        raise ConfigurationError(f"--api_key_file={file} contains no key")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
