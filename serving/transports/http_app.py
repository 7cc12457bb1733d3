"""The ASGI application: every route and middleware of the HTTP port, in one place."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp

from serving.dataplane import DataPlane
from serving.errors import InternalError, ServingError
from serving.settings import Settings
from serving.transports import rest_ops, rest_v1, rest_v2
from serving.transports.rest_guard import BodyGuard
from serving.transports.rest_json import error_response, json_response


def make_http_app(dataplane: DataPlane, settings: Settings) -> ASGIApp:
    app = Starlette(
        routes=[*rest_ops.routes(dataplane), *rest_v1.routes(dataplane), *rest_v2.routes(dataplane)],
        middleware=_cors(settings.cors_allow_origins),
        exception_handlers={
            ServingError: _serving_error,
            HTTPException: _routing_error,
            Exception: _internal_error,
        },
    )
    return BodyGuard(app, settings.max_body_bytes)


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
