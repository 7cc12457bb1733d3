"""The HTTP port: Hypercorn on sockets that are already bound."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import hypercorn.asyncio
from hypercorn.typing import Framework
from starlette.types import ASGIApp

from pinnace.errors import ConfigurationError, one_line
from pinnace.http.connections import ConnectionRegistry
from pinnace.http.hypercorn_patches import HttpConfig, apply_patches
from pinnace.http.limits import MAX_HEADER_BYTES
from pinnace.inference.admission import ByteBudget
from pinnace.settings import Settings

LISTEN_BACKLOG = 2048
# How many connections asyncio accepts before anything else runs, such as what closes others at the limit.
ACCEPT_BATCH = 2
# Bytes that the kernel takes beyond what a client has room for. Its default is up to 4 MB per connection.
MAX_KERNEL_UNSENT_BYTES = 128 * 1024
MAX_STREAMS = 1000
UNLIMITED = 10**9


class HttpServer:
    """An HTTP server. Connections are accepted from `listen` on; requests are answered from `serve` on.

    With `shared` sockets it also leaves connections for the other processes that listen on them.
    """

    def __init__(self, sockets: Sequence[socket.socket], settings: Settings, shared: bool = False) -> None:
        """Configure Hypercorn. Raises ConfigurationError if the TLS files cannot be used."""
        self._sockets = sockets
        self._config = HttpConfig()
        self._connections = ConnectionRegistry(settings.max_connections, settings.send_timeout_seconds)
        self._config.connections = self._connections
        self._config.keep_alive_timeout = settings.timeout_keep_alive
        self._config.graceful_timeout = UNLIMITED  # process.server enforces the grace period
        # With Hypercorn's default of 1000, every HTTP/2 connection breaks at request 1001:
        # https://github.com/pgjones/hypercorn/issues/241
        self._config.keep_alive_max_requests = UNLIMITED
        self._config.h2_max_concurrent_streams = MAX_STREAMS
        # HTTP/2 adds 32 bytes per field. A client that sends more is disconnected: only LimitsMiddleware can answer it.
        self._config.h2_max_header_list_size = 2 * MAX_HEADER_BYTES
        # The backlog is also how many connections asyncio accepts at a time. A worker that accepts all it can takes 14
        # to 16 of 16 connections from the other worker (measured).
        self._config.backlog = 1 if shared else ACCEPT_BATCH
        if settings.ssl_certfile:
            self._configure_tls(settings)
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("hypercorn.error")

    def _configure_tls(self, settings: Settings) -> None:
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            file: Path | None = getattr(settings, name)
            try:
                if file:
                    file.open("rb").close()
            except OSError as error:
                raise ConfigurationError(f"--{name}={file} cannot be read: {error.strerror}") from None
        config = self._config
        config.keyfile_password = ""  # otherwise OpenSSL asks for it on the terminal
        config.certfile, config.keyfile = str(settings.ssl_certfile), str(settings.ssl_keyfile)
        config.ssl_handshake_timeout = settings.read_timeout_seconds
        if settings.ssl_ca_certs:
            config.ca_certs = str(settings.ssl_ca_certs)
            config.verify_mode = ssl.CERT_OPTIONAL  # probes have no certificate; AuthMiddleware checks the others
        try:
            config.tls_context = config.create_ssl_context()
        except OSError as error:
            raise ConfigurationError(
                f"--ssl_certfile, --ssl_keyfile or --ssl_ca_certs cannot be used: {one_line(error)}"
            ) from None

    @property
    def port(self) -> int:
        """Return the port that the first socket is bound to."""
        return cast(int, self._sockets[0].getsockname()[1])

    def listen(self) -> None:
        """Start to accept connections; they wait until `serve` runs."""
        for listener in self._sockets:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_KERNEL_UNSENT_BYTES)  # inherited
            listener.listen(LISTEN_BACKLOG)

    @property
    def num_sending(self) -> int:
        """Return how many connections have responses that their clients have not taken yet."""
        return self._connections.num_sending

    def limit_connections(self, max_connections: int) -> None:
        """Lower the limit on connections."""
        self._connections.max_connections = max_connections

    def abort(self) -> None:
        """Cut every connection off."""
        self._connections.abort_all()

    def drain(self) -> None:
        """Keep accepting requests, but ask clients to reconnect for their next one."""
        self._config.draining = True

    async def serve(self, app: ASGIApp, byte_budget: ByteBudget, stop: asyncio.Event) -> None:
        """Answer requests until `stop` is set. Then refuse new connections and finish all requests in flight.

        Responses that wait to be sent count in `byte_budget`.
        """
        apply_patches()
        self._connections.use_budget(byte_budget)
        duplicates = [listener.dup() for listener in self._sockets]

        async def wait_for_stop() -> None:
            for listener in duplicates:
                listener.listen(LISTEN_BACKLOG)  # Hypercorn has just lowered the sockets' backlog to config.backlog
                listener.close()
            await stop.wait()
            self._connections.drain()

        self._config.bind = [f"fd://{listener.detach()}" for listener in self._sockets]
        closing = asyncio.create_task(self._connections.close_stalled())
        try:
            framework = cast(Framework, app)
            await hypercorn.asyncio.serve(framework, self._config, shutdown_trigger=wait_for_stop, mode="asgi")
            # Hypercorn does not wait for a connection that was accepted while the listener was being closed.
            await self._connections.wait_empty()
        finally:
            closing.cancel()
            await asyncio.wait({closing})
