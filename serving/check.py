"""`--check`: whether a start with these settings would serve every model, found out without listening."""

from __future__ import annotations

from dataclasses import replace

from serving.credentials import Credentials
from serving.lifecycle import loaded, loop_factory
from serving.settings import Settings
from serving.summary import summary
from serving.transports.http_server import HttpServer


def run(settings: Settings) -> list[str]:
    """What would be served, a line each. Raises StartError, also for one of several models, which a start only logs.

    The models of --engine=ray are loaded here, since a deployment would take the place of the one that serves.
    """
    loop_factory(settings.event_loop)
    HttpServer([], settings)  # reads the certificates
    Credentials(settings)
    with loaded(replace(settings, engine="local"), every=True) as dataplane:
        return [*summary(dataplane.repository, settings), f"it would be served on {_ports(settings)}"]


def _ports(settings: Settings) -> str:
    return f"HTTP port {settings.http_port}" + (f" and gRPC port {settings.grpc_port}" if settings.enable_grpc else "")
