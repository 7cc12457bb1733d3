"""The HTTP port: Hypercorn on sockets that are bound already."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import cast

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.typing import Framework
from starlette.types import ASGIApp

from serving.settings import Settings

BACKLOG = 2048
MOST_STREAMS = 1000
NEVER = 10**9


class HttpServer:
    """Connects nobody before `listen`. With `shared` sockets it leaves connections to the other processes as well."""

    def __init__(self, sockets: Sequence[socket.socket], settings: Settings, shared: bool = False) -> None:
        self._sockets = sockets
        self._config = Config()
        self._config.keep_alive_timeout = settings.timeout_keep_alive
        self._config.graceful_timeout = NEVER  # the lifecycle has the deadline
        self._config.keep_alive_max_requests = NEVER  # at its default every HTTP/2 connection breaks at request 1001
        self._config.h2_max_concurrent_streams = MOST_STREAMS  # one more, and Hypercorn drops the whole connection
        # As many as asyncio accepts at a time: where it takes all, one of two workers gets 14 to 16 of 16 (measured).
        self._config.backlog = 1 if shared else BACKLOG
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("hypercorn.error")

    @property
    def port(self) -> int:
        return cast(int, self._sockets[0].getsockname()[1])

    def listen(self) -> None:
        for listener in self._sockets:
            listener.listen(BACKLOG)

    async def serve(self, app: ASGIApp, stop: asyncio.Event) -> None:
        """Answers until `stop`, then refuses new connections and answers what is in flight, however long it takes."""
        kept = [listener.dup() for listener in self._sockets]

        async def until_stop() -> None:
            for listener in kept:
                listener.listen(BACKLOG)  # Hypercorn has just made it config.backlog
                listener.close()
            await stop.wait()

        self._config.bind = [f"fd://{listener.detach()}" for listener in self._sockets]
        await hypercorn.asyncio.serve(cast(Framework, app), self._config, shutdown_trigger=until_stop, mode="asgi")


class _Connection(TCPServer):
    """Ends when its client has left, which in Hypercorn 0.18 it does not.

    There it waits for the idle timer: every call of a client that closes its connection, as curl does, would hold a
    descriptor for timeout_keep_alive. Here the timer is stopped, and a last response does not start it again. And an
    HTTP/2 response waits for ever in its buffer, which nobody empties any more: here the buffers are closed.
    """

    _client_left = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._client_left = True
        await self.idle_task.stop()
        for buffer in getattr(self.protocol.protocol, "stream_buffers", {}).values():
            await buffer.close()

    async def _idle_timeout(self) -> None:
        if not self._client_left:
            await super()._idle_timeout()


hypercorn.asyncio.run.TCPServer = _Connection  # type: ignore[attr-defined]
