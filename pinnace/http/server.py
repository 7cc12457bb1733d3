"""The HTTP port: Hypercorn on sockets that are bound already."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from typing import cast

import hypercorn.asyncio
from hypercorn.typing import Framework
from starlette.types import ASGIApp

from pinnace.errors import ConfigurationError, one_line
from pinnace.http import hypercorn_http2 as http2  # noqa: F401 it takes the place of Hypercorn's
from pinnace.http.hypercorn_patches import Connections, HttpConfig
from pinnace.settings import Settings

BACKLOG = 2048
MAX_STREAMS = 1000
NEVER = 10**9


class HttpServer:
    """Connects nobody before `listen`. With `shared` sockets it leaves connections to the other processes as well."""

    def __init__(self, sockets: Sequence[socket.socket], settings: Settings, shared: bool = False) -> None:
        self._sockets = sockets
        self._config = HttpConfig()
        self._config.connections = Connections(settings.max_connections)
        self._config.keep_alive_timeout = settings.timeout_keep_alive
        self._config.graceful_timeout = NEVER  # the lifecycle has the deadline
        self._config.keep_alive_max_requests = NEVER  # at its default every HTTP/2 connection breaks at request 1001
        self._config.h2_max_concurrent_streams = MAX_STREAMS  # one more, and Hypercorn drops the whole connection
        # As many as asyncio accepts at a time: where it takes all, one of two workers gets 14 to 16 of 16 (measured).
        self._config.backlog = 1 if shared else BACKLOG
        if settings.ssl_certfile:
            self._use_tls(settings)
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("hypercorn.error")

    def _use_tls(self, settings: Settings) -> None:
        """Raises BadSetting."""
        config = self._config
        config.certfile, config.keyfile = str(settings.ssl_certfile), str(settings.ssl_keyfile)
        config.ssl_handshake_timeout = settings.read_timeout_seconds
        if settings.ssl_ca_certs:
            config.ca_certs = str(settings.ssl_ca_certs)
            config.verify_mode = ssl.CERT_OPTIONAL  # probes have none: rest_credentials asks the others
        try:
            config.create_ssl_context()
        except OSError as error:
            raise ConfigurationError(f"--ssl_certfile, --ssl_keyfile or --ssl_ca_certs: {one_line(error)}") from None

    @property
    def port(self) -> int:
        return cast(int, self._sockets[0].getsockname()[1])

    def listen(self) -> None:
        for listener in self._sockets:
            listener.listen(BACKLOG)

    def drain(self) -> None:
        """Still takes requests, and tells clients to send their next one elsewhere."""
        self._config.draining = True

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
        await self._config.connections.all_gone()  # one accepted at the moment of the close Hypercorn does not wait for
