"""The HTTP port: its sockets, and Hypercorn on them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from typing import Any, cast

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.typing import Framework
from starlette.types import ASGIApp

from serving.errors import PortInUse
from serving.settings import Settings

BACKLOG = 2048
MOST_STREAMS = 1000
NEVER = 10**9


class HttpServer:
    """Binds at once, so that a port in use is known before a model is loaded; connects nobody before `listen`."""

    def __init__(self, settings: Settings) -> None:
        """Raises PortInUse."""
        self._sockets = _bind(settings.host, settings.http_port)
        self._config = Config()
        self._config.keep_alive_timeout = settings.timeout_keep_alive
        self._config.graceful_timeout = NEVER  # the lifecycle has the deadline
        self._config.keep_alive_max_requests = NEVER  # at its default every HTTP/2 connection breaks at request 1001
        self._config.h2_max_concurrent_streams = MOST_STREAMS  # one more, and Hypercorn drops the whole connection
        self._config.backlog = BACKLOG
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
        self._config.bind = [f"fd://{listener.detach()}" for listener in self._sockets]
        await hypercorn.asyncio.serve(cast(Framework, app), self._config, shutdown_trigger=stop.wait, mode="asgi")


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


def _bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`; for none, one for IPv4 and one for IPv6, so far as the machine has them."""
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in sorted(addresses):  # IPv4 first: the port that 0 becomes is then IPv6's, too
            taken = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(_bound(family, (address[0], taken, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for listener in sockets:
            listener.close()
        where = f"port {port}" + (f" of {host}" if host else "")
        raise PortInUse(f"HTTP cannot listen on {where} ({error.strerror}): choose another with --http_port") from None
    return sockets


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
