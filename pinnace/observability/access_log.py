"""The access log: one line per HTTP request or gRPC call, in uvicorn's format or one made of asgi-logger's atoms."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pinnace.errors import escape_unprintable
from pinnace.observability.logging import ACCESS_LOGGER, FORMATTED_ACCESS_LOGGER, EscapedArguments, status_phrase
from pinnace.observability.timings import start_timings

REQUEST_ID_HEADER = b"x-request-id"
MAX_REQUEST_ID_BYTES = 200

uvicorn_logger = logging.getLogger(ACCESS_LOGGER)
formatted_logger = logging.getLogger(FORMATTED_ACCESS_LOGGER)


class AccessLogMiddleware:
    """ASGI middleware that starts a request's timings, sends its x-request-id back, and logs it when it has ended."""

    def __init__(self, app: ASGIApp, access_log_format: str) -> None:
        self._app = app
        self._format = access_log_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = dict(scope["headers"]).get(REQUEST_ID_HEADER, b"")[:MAX_REQUEST_ID_BYTES]
        timings = start_timings(request_id.decode("latin-1"))
        status: int | str = 0
        sent_bytes = 0
        response_headers: list[tuple[bytes, bytes]] = []

        async def send_and_record(message: Message) -> None:
            nonlocal status, sent_bytes, response_headers
            if message["type"] == "http.response.start":
                response_headers = list(message.get("headers", ()))
                if request_id:
                    response_headers.append((REQUEST_ID_HEADER, request_id))
                status, message = message["status"], {**message, "headers": response_headers}
            elif message["type"] == "http.response.trailers":
                status = _grpc_status(message["headers"])
            sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_and_record)
        finally:
            log_request(self._format, scope, status, sent_bytes, response_headers, timings.started_at)


def log_request(
    access_log_format: str,
    scope: Mapping[str, Any],
    status: int | str,
    sent_bytes: int,
    response_headers: Iterable[tuple[bytes, bytes]],
    started_at: float,
) -> None:
    """Log one request in the given format; if it is empty, in uvicorn's. A line never contains any of a body.

    `scope` is an ASGI scope, or what a gRPC call has of it; the status of a gRPC call is its name. `started_at` is a
    time of time.perf_counter.
    """
    if not access_log_format:
        uvicorn_logger.info(
            '%s - "%s %s HTTP/%s" %s',
            _address(scope),
            escape_unprintable(scope["method"]),
            _target(scope),
            scope["http_version"],
            status,
        )
        return
    seconds = time.perf_counter() - started_at
    formatted_logger.info(access_log_format, Atoms(scope, status, sent_bytes, response_headers, seconds))


class Atoms(EscapedArguments):
    """The values that a format can name, with asgi-logger's names. Any other name gives "-"."""

    def __init__(
        self,
        scope: Mapping[str, Any],
        status: int | str,
        sent_bytes: int,
        response_headers: Iterable[tuple[bytes, bytes]],
        seconds: float,
    ) -> None:
        client, path = scope.get("client") or ("-", 0), _text(scope["raw_path"])
        protocol, method = f"HTTP/{scope['http_version']}", escape_unprintable(scope["method"])
        request_line = f"{method} {_target(scope)} {protocol}"
        headers = {f"{{{_text(name)}}}i": _text(value) for name, value in scope["headers"]}
        headers |= {f"{{{_text(name)}}}o": _text(value) for name, value in response_headers}
        super().__init__(
            headers,
            h=client[0],
            client_addr=_address(scope),
            t=time.strftime("[%d/%b/%Y:%H:%M:%S %z]"),
            r=f"{method} {path} {protocol}",
            R=request_line,
            request_line=request_line,
            m=method,
            U=path,
            q=_text(scope["query_string"]),
            H=protocol,
            s=status,
            st=status_phrase(status).partition(" ")[2],
            status_code=status_phrase(status),
            B=sent_bytes,
            b=sent_bytes or "-",
            f=headers.get("{referer}i", "-"),
            a=headers.get("{user-agent}i", "-"),
            T=int(seconds),
            M=int(seconds * 1e3),
            D=int(seconds * 1e6),
            L=f"{seconds:.6f}",
            p=f"<{os.getpid()}>",
        )

    def __missing__(self, name: str) -> str:
        if name.startswith("{") and name.endswith("}e"):
            return escape_unprintable(os.environ.get(name[1:-2], "-"))
        return str(self[name.lower()]) if name.startswith("{") and name != name.lower() else "-"


def _address(scope: Mapping[str, Any]) -> str:
    host, port = scope.get("client") or ("-", 0)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _target(scope: Mapping[str, Any]) -> str:
    """Return path and query as they were sent: decoded, they could contain a line break."""
    path, query = _text(scope["raw_path"]), _text(scope["query_string"])
    return f"{path}?{query}" if query else path


def _text(value: bytes) -> str:
    return escape_unprintable(value.decode("latin-1"))


def _grpc_status(trailers: Iterable[tuple[bytes, bytes]]) -> str:
    number = int(dict(trailers)[b"grpc-status"])
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)
