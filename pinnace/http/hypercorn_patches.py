"""Fixes for Hypercorn 0.18: subclasses that replace its classes once `apply_patches` has been called.

Those of its protocols are in `hypercorn_http1` and `hypercorn_http2`.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import ssl
import struct
import termios
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import hypercorn.asyncio.run
import hypercorn.protocol
import hypercorn.protocol.h2
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.typing import LifespanState
from starlette.types import Scope

from pinnace.errors import one_line
from pinnace.http.connections import ConnectionRegistry
from pinnace.http.hypercorn_http1 import PatchedH11Protocol
from pinnace.http.hypercorn_http2 import Http2Config, PatchedH2Protocol
from pinnace.http.send_queue import PatchedStreamBuffer, SendQueue, current_send_queue

logger = logging.getLogger(__name__)

HAS_CERTIFICATE = "has_certificate"
LAST_REQUEST_SECONDS = 0.1
MAX_WRITE_BYTES = 64 * 1024  # per write: asyncio copies what the kernel does not take, and TLS encrypts it at once
SOCKET, CLOSING = "socket", "closing"  # what a SendQueue counts besides HTTP/2 streams
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def apply_patches() -> None:
    """Make Hypercorn use these classes for every connection that it accepts from now on."""
    hypercorn.asyncio.run.TCPServer = PatchedTCPServer  # type: ignore[attr-defined, assignment]
    hypercorn.protocol.H11Protocol = PatchedH11Protocol  # type: ignore[attr-defined]
    hypercorn.protocol.H2Protocol = PatchedH2Protocol  # type: ignore[attr-defined, assignment]
    hypercorn.protocol.h2.StreamBuffer = PatchedStreamBuffer  # type: ignore[misc]
    hypercorn.asyncio.run.asyncio = _Asyncio()  # type: ignore[attr-defined, assignment]


def has_certificate(scope: Scope) -> bool:
    """Return whether the request's client presented a certificate that --ssl_ca_certs verifies."""
    return bool(scope.get("state", {}).get(HAS_CERTIFICATE))


class HttpConfig(Http2Config):
    """Hypercorn's configuration, the registry of connections, TLS, and whether the server is draining."""

    connections: ConnectionRegistry
    tls_context: ssl.SSLContext | None = None
    draining = False

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Return the headers of every response. While draining, HTTP/1.1 clients are asked to reconnect."""
        closing = [(b"connection", b"close")] if self.draining and protocol == "h11" else []
        return [*super().response_headers(protocol), *closing]


class PatchedTCPServer(TCPServer):
    """One connection. Its failure does not affect the others, and it ends when its client disconnects.

    It fixes these faults of Hypercorn:

    - After a client disconnects, Hypercorn waits for the idle timer: every call of a client that closes its connection,
      as curl does, would hold a file descriptor for timeout_keep_alive. Here the disconnect stops the timer, and a last
      response does not restart it.
    - An HTTP/2 response to a client that has disconnected waits forever for its buffer to empty. Here the disconnect
      closes the buffers.
    - A request that arrives while Hypercorn closes its idle connection gets no response: at a stop up to 100 of 400
      (measured). Here requests already sent are answered first, and no request is read after the close.
    - An exception in a connection would end the server if it is stopping. Here it is logged.
    - Hypercorn waits forever for a client that does not read. Here `close_stalled` drops what such a client has not
      taken, and until then its bytes are counted.
    - Hypercorn waits forever to read a pipelined request behind one that ended with the connection. Here `abort` ends
      the reading.
    - asyncio makes the TLS handshake before Hypercorn sees the connection, so that nothing limits silent ones. Here the
      handshake is part of the connection.
    """

    config: HttpConfig
    _client_left = False
    _is_aborted = False
    _handshake: asyncio.Task[None] | None = None
    _reading: asyncio.Task[None] | None = None
    _last_level: tuple[int, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._send_queue = SendQueue(self, self.config.connections)
        self._socket_transport = self.writer.transport  # below TLS

    @property
    def unsent_bytes(self) -> int:
        """Return how many bytes the client has not taken yet."""
        return self._send_queue.unsent_bytes

    async def run(self) -> None:
        """Serve the connection, or refuse it if all others up to the limit are busy."""
        connections = self.config.connections
        if not await connections.admit(self):
            if self.config.tls_context:
                self.abort()  # to refuse it in words would take a handshake, which costs more than a request
            else:
                self.writer.write(REFUSAL)
                with suppress(OSError):
                    await super()._close()
            return
        current_send_queue.set(self._send_queue)
        try:
            context = None if self.writer.get_extra_info("ssl_object") else self.config.tls_context
            if context and not await self._start_tls(context):
                return
            # Now `drain` waits until everything is sent. By default it lets the last 64 KiB, or 512 with TLS, wait.
            self.writer.transport.set_write_buffer_limits(high=1, low=0)
            tls = self.writer.get_extra_info("ssl_object")
            self.state = LifespanState({**self.state, HAS_CERTIFICATE: bool(tls and tls.getpeercert())})
            await super().run()
        except Exception as error:
            leaf: BaseException = error
            while isinstance(leaf, BaseExceptionGroup):
                leaf = leaf.exceptions[0]
            if not isinstance(leaf, ConnectionAbortedError):  # it was closed to make room for another
                logger.warning("HTTP connection closed after %s: %s", type(leaf).__name__, one_line(leaf))
        finally:
            self._client_left = True
            self._send_queue.close()
            connections.remove(self)

    def disconnect(self) -> None:
        """Close the socket; no request is in flight."""
        if self.config.tls_context:
            # Otherwise it stays open until the client has confirmed the end. The kernel sends what it has.
            self.writer.transport.abort()
        else:
            self.writer.close()

    def abort(self) -> None:
        """Close the socket at once, and drop what waits to be sent."""
        self._is_aborted = True
        self._send_queue.close()
        for task in (self._handshake, self._reading):
            if task:
                task.cancel()
        # Resets the connection. The kernel would go on trying to send what it has, to a client that does not read.
        if not self._client_left:  # uvloop would set it on a new connection that has got the same number
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close_stalled(self, since: float) -> int:
        """Drop the responses that the client has not read from since that time. Return their number.

        An HTTP/2 stream without a window is reset; the connection is aborted if that leaves no other stream, or if the
        socket is what waits.
        """
        if SOCKET in self._send_queue:
            self._observe_socket()
        stalled = self._send_queue.stalled_since(since)
        if stalled & {SOCKET, CLOSING}:
            self.abort()
            return 1
        protocol = self.protocol.protocol if stalled else None
        if not isinstance(protocol, H2Protocol):
            return 0
        connection = protocol.connection
        if connection.outbound_flow_control_window <= 0 and self._send_queue.progressed_at > since:
            return 0  # the streams share the connection's window, and one of them is sending
        stalled_ids = [
            stream_id
            for stream_id, buffer in protocol.stream_buffers.items()
            if buffer in stalled and _window(protocol, stream_id) <= 0
        ]
        if stalled_ids and len(stalled_ids) >= len(protocol.streams):
            self.abort()
        elif stalled_ids:
            self._task_group.spawn(_reset_streams, protocol, stalled_ids)
        return len(stalled_ids)

    async def protocol_send(self, event: Event) -> None:
        """Handle an event of the protocol, and keep the registry up to date. Raises ConnectionAbortedError."""
        if isinstance(event, RawData):
            await self._send(event.data)
            return
        if isinstance(event, Updated) and not self._client_left:
            if self.writer.is_closing() and not event.idle:
                raise ConnectionAbortedError
            (self.config.connections.mark_idle if event.idle else self.config.connections.mark_busy)(self)
        await super().protocol_send(event)

    @property
    def _socket(self) -> socket.socket:
        connected: socket.socket = self._socket_transport.get_extra_info("socket")
        return connected

    async def _send(self, data: bytes) -> None:
        """Send the data, and wait until the kernel has taken all of it."""
        async with self.send_lock:
            view = memoryview(data)
            try:
                for start in range(0, len(data), MAX_WRITE_BYTES):
                    if self._is_aborted:
                        raise ConnectionAbortedError
                    piece = view[start : start + MAX_WRITE_BYTES]
                    self.writer.write(piece)
                    if SOCKET not in self._send_queue and self.writer.transport.get_write_buffer_size():
                        self._last_level = self._level()
                        self._send_queue.add(SOCKET, len(data) - start)
                    await self.writer.drain()
                    self._send_queue.progress(SOCKET, len(piece))
            except (ConnectionError, RuntimeError):
                await self.protocol.handle(Closed())
            finally:
                self._send_queue.finish(SOCKET)

    def _level(self) -> tuple[int, ...]:
        """Return what is left to send in asyncio's buffers, and in the kernel's until the client acknowledges it."""
        unacknowledged = b""
        with suppress(OSError, ValueError):  # it has just been closed
            unacknowledged = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return (
            self.writer.transport.get_write_buffer_size(),
            self._socket_transport.get_write_buffer_size(),
            int.from_bytes(unacknowledged, "little"),
        )

    def _observe_socket(self) -> None:
        """Register progress if the client has taken anything since the last look."""
        level = self._level()
        if level != self._last_level:
            self._last_level = level
            self._send_queue.progress(SOCKET, 0)

    async def _start_tls(self, context: ssl.SSLContext) -> bool:
        """Make the TLS handshake. Return False if it fails, takes too long, or the connection is aborted meanwhile."""
        if not self.config.connections.start_handshake(self):
            self.abort()
            return False
        self._socket_transport.set_write_buffer_limits(high=1, low=0)
        self._handshake = asyncio.create_task(
            self.writer.start_tls(context, ssl_handshake_timeout=self.config.ssl_handshake_timeout)
        )
        try:
            await asyncio.wait({self._handshake})
        finally:
            self._handshake.cancel()
            self.config.connections.end_handshake(self)
        failed = self._handshake.cancelled() or self._handshake.exception() is not None
        self._handshake = None
        return not failed

    async def _close(self) -> None:
        """Close the socket. A client that does not take the rest, or does not confirm the end of TLS, is cut off."""
        self._send_queue.add(CLOSING, 0)
        try:
            await super()._close()
        finally:
            self._send_queue.finish(CLOSING)

    async def _read_data(self) -> None:
        self._reading = asyncio.create_task(super()._read_data())
        try:
            await asyncio.wait({self._reading})
        finally:
            self._reading.cancel()
        if self._reading.cancelled():
            await self.protocol.handle(Closed())
        else:
            self._reading.result()
        self._client_left = True
        await self.idle_task.stop()
        for buffer in getattr(self.protocol.protocol, "stream_buffers", {}).values():
            await buffer.close()

    async def _idle_timeout(self) -> None:
        if self._client_left:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self.context.terminated.wait(), self.config.keep_alive_timeout)
            await asyncio.sleep(LAST_REQUEST_SECONDS)
        await asyncio.shield(self._initiate_server_close())

    async def _initiate_server_close(self) -> None:
        if self.config.connections.is_idle(self):  # checked again: a request may have arrived behind the shield
            self._send_queue.add(CLOSING, 0)  # with TLS the client must confirm the end
            await super()._initiate_server_close()


def _window(protocol: H2Protocol, stream_id: int) -> int:
    """Return how many bytes the client accepts on the stream; 0 if it is closed."""
    with suppress(ProtocolError):
        return protocol.connection.local_flow_control_window(stream_id)
    return 0


async def _reset_streams(protocol: H2Protocol, stream_ids: Sequence[int]) -> None:
    """Reset streams whose client does not read, as if the client had reset them."""
    for stream_id in stream_ids:
        with suppress(ProtocolError):
            protocol.connection.reset_stream(stream_id, ErrorCodes.CANCEL)
        if buffer := protocol.stream_buffers.get(stream_id):
            await buffer.close()
        await protocol._close_stream(stream_id)
        await protocol._window_updated(stream_id)
    await protocol._flush()


class _Listener:
    """An asyncio server that is closed without waiting for its connections, as before Python 3.12.1.

    Hypercorn closes its sockets one after the other and waits for the connections afterwards. If `wait_closed` waited
    for those of the first socket, the second would go on accepting: https://github.com/pgjones/hypercorn/issues/308.
    """

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server

    def close(self) -> None:
        self._server.close()

    async def wait_closed(self) -> None:
        """Return at once."""


Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _Asyncio:
    """The module asyncio as Hypercorn sees it, with `_Listener` as its server."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def start_server(self, callback: Accept, **options: Any) -> _Listener:
        """Start a server as `asyncio.start_server` does, but leave TLS to `PatchedTCPServer`.

        With uvloop it is the loop that makes the handshake, and connections count from then on: uvloop may read the
        client's first bytes before anybody can tell it not to.
        """
        starts_tls_later = "ssl" in options and isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
        if starts_tls_later:
            del options["ssl"], options["ssl_handshake_timeout"]
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if starts_tls_later:
                # Nothing may be read before the handshake has started, which resumes reading.
                writer.transport.pause_reading()  # type: ignore[attr-defined]
            # Not asyncio's own task: Python 3.11 logs a traceback if that is cancelled.
            task = asyncio.ensure_future(callback(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        return _Listener(await asyncio.start_server(accept, **options))
