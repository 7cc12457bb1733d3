"""The ASGI application: every route and middleware of the HTTP port, in one place."""

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
from pinnace.http import docs as rest_docs
from pinnace.http import health as rest_ops
from pinnace.http import page as rest_page
from pinnace.http import repository as rest_repository
from pinnace.http import v1 as rest_v1
from pinnace.http import v2 as rest_v2
from pinnace.http.auth import AuthMiddleware
from pinnace.http.grpc_bridge import GrpcBridge
from pinnace.http.limits import LimitsMiddleware
from pinnace.http.response import error_response, json_response
from pinnace.inference.dataplane import DataPlane
from pinnace.observability.access_log import AccessLogMiddleware
from pinnace.settings import Settings

ROUTERS = (rest_page, rest_ops, rest_v1, rest_v2, rest_repository, rest_docs)


def make_http_app(
    dataplane: DataPlane, services: Sequence[Service], credentials: Authenticator, settings: Settings
) -> ASGIApp:
    """`services` are those of the gRPC port, which the HTTP port answers as well; none where gRPC is off."""
    rest = Starlette(
        routes=[route for room in ROUTERS for route in room.routes(dataplane)],
        middleware=[*_cors(settings.cors_allow_origins), Middleware(AuthMiddleware, credentials=credentials)],
        exception_handlers={
            ServingError: _serving_error,
            HTTPException: _routing_error,
            Exception: _internal_error,
        },
    )
    guarded_rest = LimitsMiddleware(rest, dataplane.byte_budget, settings)
    guarded_grpc = LimitsMiddleware(
        GrpcBridge(services, credentials, dataplane.byte_budget, settings),
        dataplane.byte_budget,
        settings,
        endless=True,
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (guarded_grpc if services and _is_grpc(scope) else guarded_rest)(scope, receive, send)

    return AccessLogMiddleware(app, settings.access_log_format)


def _is_grpc(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["http_version"] != "2":
        return False
    types = [value.partition(b";")[0] for name, value in scope["headers"] if name == b"content-type"]
    return any(kind == b"application/grpc" or kind.startswith(b"application/grpc+") for kind in types)


def _cors(origins: str) -> list[Middleware]:
    if not origins:
        return []
    allowed = [origin.strip() for origin in origins.split(",")]
    # Any method and header, with credentials: what the tutorial's server allows its origins.
    return [
        Middleware(
            CORSMiddleware, allow_origins=allowed, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
        )
    ]


async def _serving_error(_: HttpRequest, error: Any) -> HttpResponse:
    return error_response(error)


async def _routing_error(_: HttpRequest, error: Any) -> HttpResponse:
    """Unknown paths and methods; KServe says "detail" here, which its own clients do not read."""
    response = json_response({"error": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _internal_error(_: HttpRequest, __: Exception) -> HttpResponse:
    return error_response(InternalError())
