"""The ASGI application: the routes and middleware of the HTTP port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pinnace.auth import Authenticator
from pinnace.errors import InternalError, ServingError
from pinnace.grpc.service import Service
from pinnace.http import docs, health, page, repository, v1, v2
from pinnace.http.auth import AuthMiddleware
from pinnace.http.grpc_bridge import GrpcBridge
from pinnace.http.limits import LimitsMiddleware
from pinnace.http.response import error_response, json_response
from pinnace.inference.dataplane import DataPlane
from pinnace.observability.access_log import AccessLogMiddleware
from pinnace.settings import Settings

ROUTERS = (page, health, v1, v2, repository, docs)


def make_http_app(
    dataplane: DataPlane, services: Sequence[Service], authenticator: Authenticator, settings: Settings
) -> ASGIApp:
    """Build the application of the HTTP port.

    Args:
        dataplane: What answers the requests.
        services: The services of the gRPC port, which the HTTP port offers too; empty if gRPC is disabled.
        authenticator: What every request but a probe must pass.
        settings: The settings of the server.
    """
    rest = Starlette(
        routes=[route for router in ROUTERS for route in router.routes(dataplane)],
        middleware=[*_cors(settings.cors_allow_origins), Middleware(AuthMiddleware, authenticator=authenticator)],
        exception_handlers={
            ServingError: _serving_error,
            HTTPException: _routing_error,
            Exception: _internal_error,
        },
    )
    limited_rest = LimitsMiddleware(rest, dataplane.byte_budget, settings)
    limited_grpc = LimitsMiddleware(
        GrpcBridge(services, authenticator, dataplane.byte_budget, settings),
        dataplane.byte_budget,
        settings,
        streaming=True,
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (limited_grpc if services and _is_grpc(scope) else limited_rest)(scope, receive, send)

    return AccessLogMiddleware(app, settings.access_log_format)


def _is_grpc(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["http_version"] != "2":
        return False
    types = [value.partition(b";")[0] for name, value in scope["headers"] if name == b"content-type"]
    return any(name == b"application/grpc" or name.startswith(b"application/grpc+") for name in types)


def _cors(origins: str) -> list[Middleware]:
    if not origins:
        return []
    allowed = [origin.strip() for origin in origins.split(",")]
    # All methods and headers, with credentials: the tutorial's server allows its origins the same.
    return [
        Middleware(
            CORSMiddleware, allow_origins=allowed, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
        )
    ]


async def _serving_error(_: HttpRequest, error: Any) -> HttpResponse:
    return error_response(error)


async def _routing_error(_: HttpRequest, error: Any) -> HttpResponse:
    """Return the error for an unknown path or method. KServe's key is "detail" here, which its clients do not read."""
    response = json_response({"error": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _internal_error(_: HttpRequest, __: Exception) -> HttpResponse:
    return error_response(InternalError())
