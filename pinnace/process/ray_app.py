"""The same server on Ray Serve's own proxies: `serve run pinnace.process.ray_app:app`, or deploy/ray/ on a cluster.

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

from pinnace.auth import Authenticator
from pinnace.http.app import make_http_app
from pinnace.observability.logging import set_up_logging
from pinnace.process.flags import parse_settings
from pinnace.process.server import open_dataplane
from pinnace.settings import Settings

AT_EXIT = ExitStack()
atexit.register(AT_EXIT.close)


def _http_app(settings: Settings) -> ASGIApp:
    """Load the models and return the HTTP application: in each replica, when it starts."""
    set_up_logging(settings, os.environ)
    return make_http_app(AT_EXIT.enter_context(open_dataplane(settings)), [], Authenticator(settings), settings)


# Ray runs it already, whatever --engine says.
SETTINGS = replace(parse_settings([], os.environ), engine="local")
app = serve.deployment(serve.ingress(lambda: _http_app(SETTINGS))(), name="server").bind()
