"""Fixes for Hypercorn 0.18: subclasses that replace its classes once `apply_patches` has been called.

Those of its protocols are in `hypercorn_http1` and `hypercorn_http2`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import hypercorn.asyncio.run
import hypercorn.protocol
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event, Updated
from hypercorn.typing import LifespanState
from starlette.types import Scope

from pinnace.errors import one_line
from pinnace.http.connections import ConnectionRegistry
from pinnace.http.hypercorn_http1 import PatchedH11Protocol
from pinnace.http.hypercorn_http2 import Http2Config, PatchedH2Protocol

logger = logging.getLogger(__name__)

HAS_CERTIFICATE = "has_certificate"
LAST_REQUEST_SECONDS = 0.1
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def apply_patches() -> None:
    """Make Hypercorn use these classes for every connection that it accepts from now on."""
    hypercorn.asyncio.run.TCPServer = PatchedTCPServer  # type: ignore[attr-defined]
    hypercorn.protocol.H11Protocol = PatchedH11Protocol  # type: ignore[attr-defined]
    hypercorn.protocol.H2Protocol = PatchedH2Protocol  # type: ignore[attr-defined, assignment]
    hypercorn.asyncio.run.asyncio = _Asyncio()  # type: ignore[attr-defined, assignment]


def has_certificate(scope: Scope) -> bool:
    """Return whether the request's client presented a certificate that --ssl_ca_certs verifies."""
    return bool(scope.get("state", {}).get(HAS_CERTIFICATE))


class HttpConfig(Http2Config):
    """Hypercorn's configuration, the registry of connections, and whether the server is draining."""

    connections: ConnectionRegistry
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
    """

    config: HttpConfig
    _client_left = False

    async def run(self) -> None:
        """Serve the connection, or refuse it if all others up to the limit are busy."""
        connections = self.config.connections
        if not connections.evict_idle():
            self.writer.write(REFUSAL)
            await self._close()
            return
        tls = self.writer.get_extra_info("ssl_object")
        self.state = LifespanState({**self.state, HAS_CERTIFICATE: bool(tls and tls.getpeercert())})
        connections.mark_idle(self)
        try:
            await super().run()
        except Exception as error:
            leaf: BaseException = error
            while isinstance(leaf, BaseExceptionGroup):
                leaf = leaf.exceptions[0]
            logger.warning("HTTP connection closed after %s: %s", type(leaf).__name__, one_line(leaf))
        finally:
            self._client_left = True
            connections.remove(self)

    def disconnect(self) -> None:
        """Close the socket; no request is in flight."""
        self.writer.close()

    async def protocol_send(self, event: Event) -> None:
        """Handle an event of the protocol, and keep the registry up to date. Raises ConnectionAbortedError."""
        if isinstance(event, Updated) and not self._client_left:
            if self.writer.is_closing() and not event.idle:
                raise ConnectionAbortedError
            (self.config.connections.mark_idle if event.idle else self.config.connections.mark_busy)(self)
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
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
            await super()._initiate_server_close()


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


class _Asyncio:
    """The module asyncio as Hypercorn sees it, with `_Listener` as its server."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def start_server(self, *arguments: Any, **options: Any) -> _Listener:
        """Start a server as `asyncio.start_server` does."""
        return _Listener(await asyncio.start_server(*arguments, **options))
