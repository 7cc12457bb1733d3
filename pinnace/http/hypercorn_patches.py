"""The connections of the HTTP port: Hypercorn's, bounded in their number, with what its release 0.18 lacks."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.typing import LifespanState
from starlette.types import Scope

from pinnace.errors import one_line

logger = logging.getLogger(__name__)

HAS_CERTIFICATE = "has_certificate"
LAST_REQUEST_SECONDS = 0.1
REFUSAL = b"HTTP/1.1 503 \r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def has_certificate(scope: Scope) -> bool:
    """Whether the client of a request has shown one that --ssl_ca_certs knows."""
    return bool(scope.get("state", {}).get(HAS_CERTIFICATE))


class Connections:
    """Who is connected. Of too many, the one that has been without a request longest is closed for the newcomer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._busy: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._none = asyncio.Event()
        self._none.set()

    async def all_gone(self) -> None:
        await self._none.wait()

    def make_room(self) -> bool:
        """False where every connection has a request."""
        if len(self._busy) + len(self._idle) < self._most:
            return True
        if not self._idle:
            return False
        oldest = next(iter(self._idle))
        self.forget(oldest)
        oldest.writer.close()
        return True

    def idle(self, connection: Connection) -> None:
        self._none.clear()
        self._busy.discard(connection)
        self._idle.setdefault(connection)

    def is_idle(self, connection: Connection) -> bool:
        return connection in self._idle

    def busy(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._busy.add(connection)

    def forget(self, connection: Connection) -> None:
        self._busy.discard(connection)
        self._idle.pop(connection, None)
        if not self._busy and not self._idle:
            self._none.set()


class HttpConfig(Config):
    connections: Connections
    draining = False

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """With every answer; once the server drains, a client of HTTP/1.1 is told to connect anew for its next one."""
        closing = [(b"connection", b"close")] if self.draining and protocol == "h11" else []
        return [*super().response_headers(protocol), *closing]


class Connection(TCPServer):
    """Ends when its client has left, and fails alone.

    In Hypercorn it waits for the idle timer: every call of a client that closes its connection, as curl does, would
    hold a descriptor for timeout_keep_alive. Here the timer is stopped, and a last response does not start it again.
    And an HTTP/2 response waits for ever in its buffer, which nobody empties any more: here the buffers are closed.

    In Hypercorn a request that comes while its idle connection is closed is answered to nobody: at a stop up to 100 of
    400 (measured). Here those on their way are answered first, and what comes after the close is not taken.
    """

    config: HttpConfig
    _client_left = False

    async def run(self) -> None:
        connections = self.config.connections
        if not connections.make_room():
            self.writer.write(REFUSAL)
            await self._close()
            return
        tls = self.writer.get_extra_info("ssl_object")
        self.state = LifespanState({**self.state, HAS_CERTIFICATE: bool(tls and tls.getpeercert())})
        connections.idle(self)
        try:
            await super().run()
        except Exception as error:  # it would end the server, were that just stopping
            leaf: BaseException = error
            while isinstance(leaf, BaseExceptionGroup):
                leaf = leaf.exceptions[0]
            logger.warning("a connection ended by %s: %s", type(leaf).__name__, one_line(leaf))
        finally:
            self._client_left = True
            connections.forget(self)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated) and not self._client_left:
            if self.writer.is_closing() and not event.idle:
                raise ConnectionAbortedError
            (self.config.connections.idle if event.idle else self.config.connections.busy)(self)
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
        if self.config.connections.is_idle(self):  # still: the shield lets a request pass
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
    """The module asyncio, with `_Listener` as its server."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def start_server(self, *arguments: Any, **options: Any) -> _Listener:
        """Start a server as `asyncio.start_server` does."""
        return _Listener(await asyncio.start_server(*arguments, **options))


hypercorn.asyncio.run.TCPServer = Connection  # type: ignore[attr-defined]
hypercorn.asyncio.run.asyncio = _Asyncio()  # type: ignore[attr-defined]
