"""The gRPC port: grpc.aio, in the event loop of the HTTP port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from pinnace.auth import Authenticator
from pinnace.errors import PortInUse
from pinnace.grpc.calls import OpenCalls
from pinnace.grpc.service import Call, Gate, Service, Status, Stream, Unary, to_status
from pinnace.inference.admission import ByteBudget
from pinnace.observability.access_log import MAX_REQUEST_ID_BYTES, log_request
from pinnace.observability.timings import start_timings
from pinnace.settings import Settings

MAX_STREAMS = 1000
# Calls, including those that were reset. Beyond this grpc cancels calls at random; a flood of resets exceeds its
# default of 1,000.
MAX_PENDING_CALLS = 5000
# Clients may send keep-alive pings this often, also between calls. With the default of 5 minutes, pings every 10 s, the
# shortest interval of grpc-go and grpc-java, ended the connection and its calls at the fourth. Three that come sooner
# still end it.
MIN_PING_INTERVAL_MS = 1000
# The measure of HTTP/2, which adds 32 bytes per entry, and the limit of the HTTP port. Below it the gate has the limit:
# between its soft limit of 8 KiB and its absolute one of 16 KiB, grpc would refuse calls at random.
MAX_HEADER_LIST_BYTES = 64 * 1024
LAST_PING_SECONDS = 1.0
NO_TIMEOUT = float(10**6)  # seconds; process.server has the deadline

Context = grpc.aio.ServicerContext[Any, Any]


class GrpcServer:
    """The listener of the gRPC port. An error ends its call with the status that the error's class declares."""

    def __init__(
        self,
        services: Sequence[Service],
        authenticator: Authenticator,
        byte_budget: ByteBudget,
        settings: Settings,
        shared: bool,
    ) -> None:
        """Prepare the server. Unless the port is `shared` with other workers, a port in use is refused."""
        self._services = services
        self._gate = Gate(authenticator, settings)
        self._calls = OpenCalls(byte_budget, settings.send_timeout_seconds)
        self._settings = settings
        self._shared = shared
        self.port = settings.grpc_port

    @property
    def num_unsent(self) -> int:
        """Return the number of unary calls whose response has waited to be sent for over a second."""
        return self._calls.num_unsent

    async def start(self) -> None:
        """Listen and answer calls. Raises PortInUse."""
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_disconnect)
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
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            # A connection that does not acknowledge a ping is closed. Idle ones are pinged too.
            ("grpc.keepalive_time_ms", settings.send_timeout_seconds * 1000),
            ("grpc.keepalive_timeout_ms", settings.send_timeout_seconds * 1000),
            ("grpc.max_metadata_size", MAX_HEADER_LIST_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_HEADER_LIST_BYTES),
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
        sweep = asyncio.create_task(self._calls.end_stalled())
        try:
            await stop.wait()
            await self._drain()
        finally:
            sweep.cancel()
            await self._server.stop(None)  # otherwise a remaining call delays the end of the process for a minute

    async def _drain(self) -> None:
        """Return when all clients know of the stop, or soon after the last unary call is answered.

        grpc closes a connection when its client has acknowledged a ping, and waits 20 s for one that does not. Streams
        have no end of their own: health ends its streams when the server drains.
        """
        closing = asyncio.create_task(self._server.stop(NO_TIMEOUT))
        try:
            while not closing.done():
                no_unary = asyncio.create_task(self._calls.wait_until_no_unary())
                await asyncio.wait({closing, no_unary}, return_when=asyncio.FIRST_COMPLETED)
                no_unary.cancel()
                # Calls that grpc has accepted may begin only now.
                await asyncio.wait({closing}, timeout=LAST_PING_SECONDS)
                if not self._calls.has_unary:
                    return
        finally:
            closing.cancel()

    def _unary_handler(self, path: str, method: Unary) -> Any:
        async def answer(_: object, context: Context) -> bytes:
            with self._log_call(path, context) as record:
                open_call = self._calls.open(is_stream=False)
                try:
                    call = _make_call(path, record, context)
                    with self._gate.admit(call, is_stream=False):
                        response = await method(await self._gate.read_request(call), call.metadata)
                    self._calls.count_response(open_call, len(response))
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
                open_call = self._calls.open(is_stream=True)
                try:
                    call = _make_call(path, record, context)
                    with self._gate.admit(call, is_stream=True):
                        async for message in method(self._gate.read_requests(call), call.metadata):
                            record.sent_bytes += len(message)
                            self._calls.count_response(open_call, len(message))
                            yield message
                            self._calls.response_sent(open_call)
                    record.status = grpc.StatusCode.OK
                except Exception as error:
                    await _abort(record, to_status(error), context)

        return grpc.stream_stream_rpc_method_handler(answer)

    @contextmanager
    def _log_call(self, path: str, context: Context) -> Iterator[_CallRecord]:
        """Start the timings of a call, and write its access log line when it ends."""
        client = _address(context.peer())
        entries = context.invocation_metadata() or ()
        metadata = {key: value for key, value in entries if isinstance(value, str)}
        metadata_bytes = len(path) + sum(len(key) + len(value) for key, value in entries)
        record = _CallRecord(metadata, metadata_bytes, client[0] if client else "")
        request_id = metadata.get("x-request-id", "")[:MAX_REQUEST_ID_BYTES]
        if request_id:
            context.set_trailing_metadata((("x-request-id", request_id),))
        timings = start_timings(request_id)
        try:
            yield record
        finally:
            scope = {
                "client": client,
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
    """The metadata of one call without binary entries, the size of all, and how the call ended, for the access log."""

    metadata: dict[str, str]
    metadata_bytes: int
    client: str
    status: grpc.StatusCode = grpc.StatusCode.CANCELLED
    sent_bytes: int = 0


def _make_call(path: str, record: _CallRecord, context: Context) -> Call:
    async def receive() -> bytes | None:
        # Not grpc's iterator: it keeps its last message until Python's garbage collection, 642 of 0.6 MB with 64
        # clients.
        message = await context.read()
        return None if message is grpc.aio.EOF else message

    # TLS has checked the certificate.
    return Call(path, record.metadata, record.metadata_bytes, record.client, has_certificate=True, receive=receive)


def _is_no_disconnect(record: logging.LogRecord) -> bool:
    """Return False for the traceback that grpc logs when a client disconnects before it has taken its response."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def _address(peer: str) -> tuple[str, int] | None:
    """Return the address and port of a peer as grpc names it, such as ipv4:127.0.0.1:50000."""
    host, _, port = peer.partition(":")[2].rpartition(":")
    return (unquote(host).strip("[]"), int(port)) if port.isdigit() else None


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
