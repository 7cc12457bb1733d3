"""`--check`: whether a start with these settings would serve every model, found out without listening."""

from __future__ import annotations

from dataclasses import replace

from pinnace.auth import Authenticator
from pinnace.http.server import HttpServer
from pinnace.process.server import loop_factory, open_dataplane
from pinnace.process.summary import summary
from pinnace.settings import Settings


def run(settings: Settings) -> list[str]:
    """What would be served, a line each. Raises StartError, also for one of several models, which a start only logs.

    The models of --engine=ray are loaded here, since a deployment would take the place of the one that serves.
    """
    loop_factory(settings.event_loop)
    HttpServer([], settings)  # reads the certificates
    Authenticator(settings)
    with open_dataplane(replace(settings, engine="local"), require_all=True) as dataplane:
        return [*summary(dataplane.repository, settings), f"it would be served on {_ports(settings)}"]


def _ports(settings: Settings) -> str:
    return f"HTTP port {settings.http_port}" + (f" and gRPC port {settings.grpc_port}" if settings.enable_grpc else "")
