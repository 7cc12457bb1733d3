"""`--check`: find out, without listening, whether a start with these settings would serve every model."""

from __future__ import annotations

from dataclasses import replace

from pinnace.auth import Authenticator
from pinnace.http.server import HttpServer
from pinnace.process.server import loop_factory, open_dataplane
from pinnace.process.summary import summarize
from pinnace.settings import Settings


def run(settings: Settings) -> list[str]:
    """Load the models and return lines that describe what a start would serve.

    Raises StartupError, even if only one of several models fails to load; a normal start logs that failure. With
    --engine=ray the models are loaded in this process, because a deployment would replace the one that is serving.
    """
    loop_factory(settings.event_loop)
    HttpServer([], settings)  # to read the certificates
    Authenticator(settings)
    with open_dataplane(replace(settings, engine="local"), require_all=True) as dataplane:
        return [*summarize(dataplane.repository, settings), f"check passed: a start would listen on {_ports(settings)}"]


def _ports(settings: Settings) -> str:
    return f"HTTP port {settings.http_port}" + (f" and gRPC port {settings.grpc_port}" if settings.enable_grpc else "")
