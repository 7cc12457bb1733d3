"""Certificates that openssl makes for a test."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple


class Identity(NamedTuple):
    """The files of a certificate and of its private key."""

    certificate: Path
    key: Path

    @property
    def pem(self) -> tuple[bytes, bytes]:
        """Key and certificate, in the order in which grpc takes them."""
        return self.key.read_bytes(), self.certificate.read_bytes()


def make_identity(folder: Path, name: str, issuer: Identity | None) -> Identity:
    """Write a certificate that `issuer` has signed and its key to `folder`; without an issuer, a CA's own."""
    identity = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    rights: list[object] = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
    if issuer:
        rights = ["-CA", issuer.certificate, "-CAkey", issuer.key, "-addext", "basicConstraints=critical,CA:FALSE"]
        rights += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    _run_openssl(*new, "-subj", f"/CN={name}", "-keyout", identity.key, "-out", identity.certificate, *rights)
    return identity


def encrypt_key(key: Path, folder: Path) -> Path:
    """Write a copy of a private key that a password protects to `folder`, and return its path."""
    encrypted = folder / "encrypted.key"
    _run_openssl("pkcs8", "-topk8", "-in", key, "-out", encrypted, "-passout", "pass:secret")
    return encrypted


def _run_openssl(*arguments: Any) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)
