"""Certificates made for a test, by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple


class Party(NamedTuple):
    """A certificate and its key, as files."""

    certificate: Path
    key: Path

    @property
    def bytes(self) -> tuple[bytes, bytes]:
        return self.key.read_bytes(), self.certificate.read_bytes()


def _openssl(*arguments: Any) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def make_party(folder: Path, name: str, issuer: Party | None) -> Party:
    party = Party(folder / f"{name}.pem", folder / f"{name}.key")
    rights: list[object] = ["-addext", "basicConstraints=critical,CA:TRUE"]
    if issuer:
        rights = ["-CA", issuer.certificate, "-CAkey", issuer.key]
        rights += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    _openssl(*new, "-subj", f"/CN={name}", "-keyout", party.key, "-out", party.certificate, *rights)
    return party
