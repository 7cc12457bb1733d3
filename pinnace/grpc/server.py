"""The gRPC port: grpc.aio, in the event loop of the HTTP port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from pinnace.auth import Authenticator
from pinnace.errors import PortInUse, RequestTimeout
from pinnace.grpc.service import PROBES, Service, Status, Stream, Unary, require_message, to_status
from pinnace.observability import access_log
from pinnace.observability.logging import REQUEST_ID
from pinnace.settings import Settings

MAX_STREAMS = 1000
MAX_PENDING_CALLS = (
    5000  # calls, reset ones too; beyond it grpc cancels at random: a flood of resets passes its own 1,000
)
NEVER = float(10**6)  # seconds; the lifecycle has the deadline


class GrpcServer:
    """One listener; every method answers its errors with the status that their class declares."""

    def __init__(
        self, services: Sequence[Service], credentials: Authenticator, settings: Settings, shared: bool
    ) -> None:
        """Not `shared`, a port that somebody listens on already is refused."""
        self._credentials = credentials
        self._settings = settings
        self._shared = shared
        self._services = services
        self.port = settings.grpc_port

    async def start(self) -> None:
        """Listen and answer. Raises PortInUse."""
        settings = self._settings
        options = [
            ("grpc.max_receive_message_length", settings.grpc_max_receive_message_length),
            ("grpc.max_send_message_length", settings.grpc_max_send_message_length),
            ("grpc.max_allowed_incoming_connections", settings.max_connections),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.max_connection_idle_ms", settings.timeout_keep_alive * 1000),
            ("grpc.so_reuseport", int(self._shared)),
        ]
        self._server = grpc.aio.server(options=options)
        for service in self._services:
            for name in service.names:
                handlers = {}
                for method, unary in service.unary.items():
                    handlers[method] = _unary(unary, self._around(f"/{name}/{method}"))
                for method, stream in service.streams.items():
                    handlers[method] = _stream(stream, self._around(f"/{name}/{method}"))
                self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
        host = settings.host or "::"
        address = f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"
        try:
            if settings.ssl_certfile:
                self.port = self._server.add_secure_port(address, _tls(settings))
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise PortInUse(
                f"gRPC cannot listen on port {settings.grpc_port}: choose another with --grpc_port"
            ) from None
        await self._server.start()

    async def serve(self, stop: asyncio.Event) -> None:
        """Answers until `stop`, then refuses new calls and answers what is in flight; cancelled, it cuts that."""
        await stop.wait()
        try:
            await self._server.stop(NEVER)
        finally:
            await self._server.stop(None)  # else a call that is left holds up the end of the process for a minute

    def _around(self, path: str) -> _Around:
        line_of = partial(_logged, path, self._settings.access_log_format)
        return _Around(line_of, None if path in PROBES else self._credentials, self._settings.read_timeout_seconds)


@dataclass(slots=True)
class _Call:
    """One call, and what the access line says of its end, which its handler fills in."""

    metadata: dict[str, str]
    status: grpc.StatusCode = grpc.StatusCode.CANCELLED
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Around:
    """What each call of a method has around it: the line that is written of it, what it has to show, a deadline."""

    line_of: Callable[[Context], AbstractContextManager[_Call]]
    credentials: Authenticator | None
    read_timeout_seconds: int

    async def first(self, context: Context, call: _Call) -> bytes | None:
        """The first message, of a call that may ask. Raises Unauthenticated and TooSlow."""
        if self.credentials:
            self.credentials.check(call.metadata.get("authorization", ""), has_certificate=True)
        try:
            async with asyncio.timeout(self.read_timeout_seconds):
                return await _next(context)
        except TimeoutError:
            raise RequestTimeout(self.read_timeout_seconds) from None

    async def all(self, context: Context, call: _Call) -> AsyncIterator[bytes]:
        """The rest may take any time."""
        message = await self.first(context, call)
        while message is not None:
            yield message
            message = await _next(context)


Context = grpc.aio.ServicerContext[Any, Any]


@contextmanager
def _logged(path: str, access_log_format: str, context: Context) -> Iterator[_Call]:
    call, started_at = _Call(_metadata(context)), time.perf_counter()
    request_id = call.metadata.get("x-request-id", "")[: access_log.MAX_REQUEST_ID_BYTES]
    if request_id:
        context.set_trailing_metadata((("x-request-id", request_id),))
    REQUEST_ID.set(request_id)
    try:
        yield call
    finally:
        host, _, port = context.peer().partition(":")[2].rpartition(":")
        scope = {
            "client": (unquote(host).strip("[]"), int(port)) if port.isdigit() else None,
            "method": "POST",
            "raw_path": path.encode(),
            "query_string": b"",
            "http_version": "2",
            "headers": [(name.encode(), value.encode()) for name, value in call.metadata.items()],
        }
        seconds = time.perf_counter() - started_at
        access_log.write(access_log_format, scope, call.status.name, call.sent_bytes, (), seconds)


def _tls(settings: Settings) -> grpc.ServerCredentials:
    """Where CAs are named, nobody connects without a certificate of theirs."""
    files = (settings.ssl_keyfile, settings.ssl_certfile, settings.ssl_ca_certs)
    key, certificate, authorities = (file.read_bytes() if file else b"" for file in files)
    return grpc.ssl_server_credentials([(key, certificate)], authorities or None, bool(authorities))


def _unary(method: Unary, around: _Around) -> Any:
    async def answer(_: object, context: Context) -> bytes:
        with around.line_of(context) as call:
            try:
                response = await method(require_message(await around.first(context, call)), call.metadata)
                call.status, call.sent_bytes = grpc.StatusCode.OK, len(response)
                return response
            except Exception as error:
                status = to_status(error)
            return await _end(call, status, context)

    # No deserializer: grpc would answer what it raises with UNKNOWN and its text. A stream of one message, since grpc
    # itself would wait for ever for the rest of one: on the wire it is the same.
    return grpc.stream_unary_rpc_method_handler(answer)


def _stream(method: Stream, around: _Around) -> Any:
    """Also for methods of one request: on the wire they are streams as well."""

    async def answer(_: object, context: Context) -> AsyncIterator[bytes]:
        with around.line_of(context) as call:
            try:
                async for message in method(around.all(context, call), call.metadata):
                    call.sent_bytes += len(message)
                    yield message
                call.status = grpc.StatusCode.OK
            except Exception as error:
                await _end(call, to_status(error), context)

    return grpc.stream_stream_rpc_method_handler(answer)


async def _next(context: Context) -> bytes | None:
    """A message, or None at their end.

    Not by grpc's iterator: that keeps its last one until Python looks for cycles, 642 of 0.6 MB with 64 clients.
    """
    message = await context.read()
    return None if message is grpc.aio.EOF else message


async def _end(call: _Call, status: Status, context: Context) -> bytes:
    """Returns only where grpc has ended the call itself, as it does with too long a message: nobody is sent that."""
    call.status = status.code
    context.set_trailing_metadata((*context.trailing_metadata(), *status.trailers))
    with suppress(grpc.aio.InternalError):
        await context.abort(status.code, status.text)
    return b""


def _metadata(context: Context) -> dict[str, str]:
    """The call's metadata without binary entries."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
