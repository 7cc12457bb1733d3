"""The same server on Ray Serve's own proxies: `serve run serving.ray_app:app`, or deploy/ray/ on a cluster.

Every replica is a whole REST server behind Ray's HTTP proxy, which passes no gRPC on. Its settings are taken from the
environment.
"""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack
from dataclasses import replace

from ray import serve
from starlette.types import ASGIApp

from serving.command_line import parse_settings
from serving.credentials import Credentials
from serving.lifecycle import loaded
from serving.logs import configure_logging
from serving.settings import Settings
from serving.transports.http_app import make_http_app

AT_EXIT = ExitStack()
atexit.register(AT_EXIT.close)


def _http_app(settings: Settings) -> ASGIApp:
    """In a replica, when it starts."""
    configure_logging(settings, os.environ)
    return make_http_app(AT_EXIT.enter_context(loaded(settings)), [], Credentials(settings), settings)


# Ray runs it already, whatever --engine says.
SETTINGS = replace(parse_settings([], os.environ), engine="local")
app = serve.deployment(serve.ingress(lambda: _http_app(SETTINGS))(), name="server").bind()
