"""Whether the server in a container is ready, for the image's HEALTHCHECK: `python -m pinnace.process.healthcheck`.

It asks the port that the server's own flags and environment say; the server is the container's first process.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from pathlib import Path

from pinnace.process.flags import parse_settings

TIMEOUT_SECONDS = 4.0


def main(process_id: str = "1") -> int:
    """An exit code: 0 where a prediction would be answered now."""
    _, _, flags = Path(f"/proc/{process_id}/cmdline").read_text().rstrip("\0").partition("app.py")
    settings = parse_settings(flags.split("\0")[1:], os.environ)
    host = settings.host or "localhost"
    connection = http.client.HTTPConnection(host, settings.http_port, timeout=TIMEOUT_SECONDS)
    if settings.ssl_certfile:  # whose name is hardly this host's
        unverified = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(host, settings.http_port, timeout=TIMEOUT_SECONDS, context=unverified)
    try:
        connection.request("GET", "/v2/health/ready")
        return 0 if connection.getresponse().status == 200 else 1
    except OSError as error:
        sys.stderr.write(f"port {settings.http_port}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
