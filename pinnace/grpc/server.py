"""The gRPC port: grpc.aio, in the event loop of the HTTP port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from pinnace.auth import Authenticator
from pinnace.errors import PortInUse
from pinnace.grpc.service import Call, Gate, Service, Status, Stream, Unary, to_status
from pinnace.observability.access_log import MAX_REQUEST_ID_BYTES, log_request
from pinnace.observability.timings import start_timings
from pinnace.settings import Settings

MAX_STREAMS = 1000
# Calls, including those that were reset. Beyond this grpc cancels calls at random; a flood of resets exceeds its
# default of 1,000.
MAX_PENDING_CALLS = 5000
NO_TIMEOUT = float(10**6)  # seconds; process.server has the deadline

Context = grpc.aio.ServicerContext[Any, Any]


class GrpcServer:
    """The listener of the gRPC port. An error ends its call with the status that the error's class declares."""

    def __init__(
        self, services: Sequence[Service], authenticator: Authenticator, settings: Settings, shared: bool
    ) -> None:
        """Prepare the server. Unless the port is `shared` with other workers, a port in use is refused."""
        self._services = services
        self._gate = Gate(authenticator, settings)
        self._settings = settings
        self._shared = shared
        self.port = settings.grpc_port

    async def start(self) -> None:
        """Listen and answer calls. Raises PortInUse."""
        settings = self._settings
        options = [
            ("grpc.max_receive_message_length", settings.grpc_max_receive_message_length),
            ("grpc.max_send_message_length", settings.grpc_max_send_message_length),
            ("grpc.max_allowed_incoming_connections", settings.max_connections),
            # Counted among the connections, but grpc's default time is 120 s.
            ("grpc.server_handshake_timeout_ms", settings.read_timeout_seconds * 1000),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.max_connection_idle_ms", settings.timeout_keep_alive * 1000),
            ("grpc.so_reuseport", int(self._shared)),
        ]
        self._server = grpc.aio.server(options=options)
        for service in self._services:
            for name in service.names:
                handlers = {
                    method: self._unary_handler(f"/{name}/{method}", unary) for method, unary in service.unary.items()
                }
                for method, stream in service.streams.items():
                    handlers[method] = self._stream_handler(f"/{name}/{method}", stream)
                self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
        host = settings.host or "::"
        address = f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"
        try:
            if settings.ssl_certfile:
                self.port = self._server.add_secure_port(address, _tls_credentials(settings))
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise PortInUse(
                f"gRPC cannot listen on port {settings.grpc_port}: choose another with --grpc_port"
            ) from None
        await self._server.start()

    async def serve(self, stop: asyncio.Event) -> None:
        """Answer calls until `stop`, then refuse new ones and finish those in flight. If cancelled, cut them off."""
        await stop.wait()
        try:
            await self._server.stop(NO_TIMEOUT)
        finally:
            await self._server.stop(None)  # otherwise a remaining call delays the end of the process for a minute

    def _unary_handler(self, path: str, method: Unary) -> Any:
        async def answer(_: object, context: Context) -> bytes:
            with self._log_call(path, context) as record:
                try:
                    call = _make_call(path, record, context)
                    response = await method(await self._gate.read_request(call), call.metadata)
                    record.status, record.sent_bytes = grpc.StatusCode.OK, len(response)
                    return response
                except Exception as error:
                    status = to_status(error)
                return await _abort(record, status, context)

        # There is no deserializer: grpc would answer what it raises with UNKNOWN and its text. The call is a stream of
        # one message, which is the same on the wire: for a unary call grpc itself would wait forever for the rest of a
        # message.
        return grpc.stream_unary_rpc_method_handler(answer)

    def _stream_handler(self, path: str, method: Stream) -> Any:
        """Return a handler for methods that stream responses. One request is a stream of one on the wire."""

        async def answer(_: object, context: Context) -> AsyncIterator[bytes]:
            with self._log_call(path, context) as record:
                try:
                    call = _make_call(path, record, context)
                    async for message in method(self._gate.read_requests(call), call.metadata):
                        record.sent_bytes += len(message)
                        yield message
                    record.status = grpc.StatusCode.OK
                except Exception as error:
                    await _abort(record, to_status(error), context)

        return grpc.stream_stream_rpc_method_handler(answer)

    @contextmanager
    def _log_call(self, path: str, context: Context) -> Iterator[_CallRecord]:
        """Start the timings of a call, and write its access log line when it ends."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        record = _CallRecord(metadata)
        request_id = metadata.get("x-request-id", "")[:MAX_REQUEST_ID_BYTES]
        if request_id:
            context.set_trailing_metadata((("x-request-id", request_id),))
        timings = start_timings(request_id)
        try:
            yield record
        finally:
            host, _, port = context.peer().partition(":")[2].rpartition(":")
            scope = {
                "client": (unquote(host).strip("[]"), int(port)) if port.isdigit() else None,
                "method": "POST",
                "raw_path": path.encode(),
                "query_string": b"",
                "http_version": "2",
                "headers": [(name.encode(), value.encode()) for name, value in metadata.items()],
            }
            log_request(
                self._settings.access_log_format, scope, record.status.name, record.sent_bytes, (), timings.started_at
            )


@dataclass(slots=True)
class _CallRecord:
    """The metadata of one call without binary entries, and how it ended, for the access log."""

    metadata: dict[str, str]
    status: grpc.StatusCode = grpc.StatusCode.CANCELLED
    sent_bytes: int = 0


def _make_call(path: str, record: _CallRecord, context: Context) -> Call:
    async def receive() -> bytes | None:
        # Not grpc's iterator: it keeps its last message until Python's garbage collection, 642 of 0.6 MB with 64
        # clients.
        message = await context.read()
        return None if message is grpc.aio.EOF else message

    return Call(path, record.metadata, has_certificate=True, receive=receive)  # TLS has checked the certificate


def _tls_credentials(settings: Settings) -> grpc.ServerCredentials:
    """Return the server's TLS credentials. With --ssl_ca_certs, clients without a valid certificate cannot connect."""
    files = (settings.ssl_keyfile, settings.ssl_certfile, settings.ssl_ca_certs)
    key, certificate, authorities = (file.read_bytes() if file else b"" for file in files)
    return grpc.ssl_server_credentials([(key, certificate)], authorities or None, bool(authorities))


async def _abort(record: _CallRecord, status: Status, context: Context) -> bytes:
    """End a call with an error. Returns only if grpc has ended the call itself, as it does if a message is too long."""
    record.status = status.code
    context.set_trailing_metadata((*context.trailing_metadata(), *status.trailers))
    with suppress(grpc.aio.InternalError):
        await context.abort(status.code, status.text)
    return b""
