"""The image's HEALTHCHECK, `python -m pinnace.process.healthcheck`: exit 0 if the server in the container is ready.

The server is the container's first process. Its own flags and environment say which port to ask.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path, PurePath

from pinnace.errors import ConfigurationError
from pinnace.process.flags import parse_settings
from pinnace.version import NAME

TIMEOUT_SECONDS = 4.0


def main(process_id: str = "1") -> int:
    """Return 0 if the server would answer a prediction now; else print why not, and return 1."""
    try:
        command = Path(f"/proc/{process_id}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError as error:
        return _unhealthy(f"process {process_id}: {error.strerror}")
    if command == [""]:
        return _unhealthy(f"process {process_id} has ended")
    try:
        settings = parse_settings(server_flags(command), os.environ)
    except ConfigurationError as error:
        return _unhealthy(str(error))
    host = settings.host or "localhost"
    connection = HTTPConnection(host, settings.http_port, timeout=TIMEOUT_SECONDS)
    if settings.ssl_certfile:  # its certificate is hardly for the name of this host
        unverified = ssl._create_unverified_context()  # noqa: S323
        connection = HTTPSConnection(host, settings.http_port, timeout=TIMEOUT_SECONDS, context=unverified)
    try:
        connection.request("GET", "/v2/health/ready")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return _unhealthy(f"port {settings.http_port}: {error}")
    return 0 if status == 200 else _unhealthy(f"port {settings.http_port}: not ready")


def server_flags(command: Sequence[str]) -> Sequence[str]:
    """Return the flags in a server's command line: `app.py …`, `pinnace serve …` or `python -m pinnace serve …`."""
    for index, argument in enumerate(command):
        name = PurePath(argument).name
        if name == "app.py":
            return command[index + 1 :]
        if name == NAME and command[index + 1 : index + 2] == ["serve"]:
            return command[index + 2 :]
    return []


def _unhealthy(reason: str) -> int:
    sys.stderr.write(f"{NAME}: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
