"""Clients that hold connections: they do not read, give no window, or read one byte per second."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress

from tests.attacks import Attack
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT
from tests.support.servers import Server
from tests.support.unread import Http2Client, connect_with_small_buffer

SECONDS = 6.0
FEW_CONNECTIONS = ("--max_connections=20",)
CONNECTIONS = 25
GET = b"GET %s HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\n\r\n"
SMALL_BUDGET = ("--max_queue_bytes=4194304",)
STREAMS = 46


def _hold(server: Server, path: bytes, pipelined: int) -> None:
    """Keep more connections than are allowed, each with this many requests; open those that are closed again."""
    request = GET % path * pipelined
    with ExitStack() as stack:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for _ in range(CONNECTIONS):
                connection = stack.enter_context(connect_with_small_buffer(server))
                connection.setblocking(False)
                with suppress(OSError):
                    connection.send(request)
            time.sleep(2)


def _give_no_window(server: Server) -> None:
    """Let 46 predictions on one connection be answered whose bodies fill the byte budget, and read none."""
    body = make_v1_request(CAT).encode().ljust(100_000)
    with Http2Client(server, window_bytes=0) as client:
        for _ in range(STREAMS):
            client.request(body)
        time.sleep(SECONDS)


def _read_slowly(server: Server) -> None:
    """Read one byte per second from each of more connections than are allowed."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connect_with_small_buffer(server)) for _ in range(CONNECTIONS)]
        for connection in connections:
            connection.setblocking(False)
            with suppress(OSError):
                connection.send(GET % b"/metrics" * 500)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for connection in connections:
                with suppress(OSError):
                    connection.recv(1)
            time.sleep(1)


ATTACKS = {
    "25 connections that do not read the page": Attack(lambda server: _hold(server, b"/", 1000), FEW_CONNECTIONS),
    "25 connections that do not read the metrics": Attack(
        lambda server: _hold(server, b"/metrics", 500), FEW_CONNECTIONS
    ),
    "25 connections that read one byte per second": Attack(_read_slowly, FEW_CONNECTIONS),
    "46 streams without a window": Attack(_give_no_window, SMALL_BUDGET),
}
