"""Clients that do not read their responses: they lose their connection or stream, and cost nobody else anything."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType

import h2.errors
import h2.events
import pytest

from tests.support.clients import INFER, frame_message, make_image_request
from tests.support.metrics import requests_by_outcome
from tests.support.servers import Server, read_until, run_gated_server, run_server
from tests.support.unread import Http2Client, connect_with_small_buffer, make_echo_request, make_http1_request
from tests.support.waiting import wait_for

ECHO = "--predictor=tests.support.predictors:Echo"
LARGE = make_echo_request(3_000_000)
DROPPED = re.compile(r"(\d+) responses dropped: their clients had read nothing for (\d+) s")
PIPELINED = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 300


def wait_for_answers(server: Server, expected: int) -> None:
    wait_for(lambda: requests_by_outcome(server).get(("v1", "answered")) == expected, f"{expected} answers")


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 20):
            data += chunk
    return data


@pytest.mark.parametrize("request_bytes", [make_http1_request(LARGE), PIPELINED], ids=["large", "pipelined"])
def test_connections_that_do_not_read_make_room_for_new_ones(request_bytes: bytes) -> None:
    with run_server(ECHO, "--max_connections=4") as server, ExitStack() as stack:
        for _ in range(6):
            connection = stack.enter_context(connect_with_small_buffer(server))
            connection.sendall(request_bytes)

        statuses = [server.get("/v2/health/ready").status_code for _ in range(20)]

    assert statuses == [200] * 20


def test_a_connection_that_does_not_read_for_a_second_is_closed_before_an_idle_one() -> None:
    with (
        run_server(ECHO, "--max_connections=2") as server,
        server.connect() as idle,
        connect_with_small_buffer(server) as unread,
    ):
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(idle, b'{"status":"alive"}')
        unread.sendall(make_http1_request(LARGE))
        time.sleep(5)  # it takes a second from the last progress, which is looked for once per second
        assert server.get("/").status_code == 200
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

        assert read_until(idle, b'{"status":"alive"}').startswith(b"HTTP/1.1 200 ")
        assert len(read_all(unread)) < len(LARGE)


@pytest.fixture(scope="module", name="impatient")
def run_impatient_server() -> Iterator[Server]:
    with run_server(ECHO, "--send_timeout_seconds=1", "--max_queue_bytes=8000000") as server:
        yield server


def test_a_connection_that_does_not_read_is_closed_after_send_timeout_seconds(impatient: Server) -> None:
    with connect_with_small_buffer(impatient) as unread:
        unread.sendall(make_http1_request(LARGE))

        assert impatient.wait_for_line(DROPPED).groups() == ("1", "1")
        assert len(read_all(unread)) < len(LARGE)


def test_a_client_that_reads_slowly_but_steadily_gets_its_whole_response(impatient: Server) -> None:
    with connect_with_small_buffer(impatient) as slow:
        slow.sendall(make_http1_request(LARGE))
        received = b""
        deadline = time.monotonic() + 3  # three times what a client that reads nothing has
        while time.monotonic() < deadline:
            received += slow.recv(50_000)
            time.sleep(0.1)  # what is tested is the pace
        assert len(received) < len(LARGE) - 500_000
        while not received.endswith(b'x"]}'):
            received += slow.recv(1 << 20)

    assert received.startswith(b"HTTP/1.1 200 ")


def test_a_connection_whose_streams_all_lack_a_window_is_closed_after_send_timeout_seconds(impatient: Server) -> None:
    with Http2Client(impatient, window_bytes=0) as client:
        for _ in range(3):
            client.request(b'{"instances": [1]}')

        assert impatient.wait_for_line(DROPPED).groups() == ("3", "1")
        while client.receive():
            pass


def test_a_stream_without_a_window_is_reset_and_the_others_of_its_connection_are_answered(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    held = make_gate("held")
    with (
        run_gated_server(tmp_path, "--send_timeout_seconds=1") as server,
        Http2Client(server, window_bytes=0) as client,
    ):
        waiting = client.request(b'{"instances": ["held"]}')
        with held.open("wb"):
            unread = client.request(b"", "/v2/health/live")
            client.wait_for(h2.events.StreamReset, unread)
        client.wait_for(h2.events.ResponseReceived, waiting)

    (reset,) = (event for event in client.events if isinstance(event, h2.events.StreamReset))
    assert (reset.stream_id, reset.error_code) == (unread, h2.errors.ErrorCodes.CANCEL)


def test_a_grpc_call_without_a_window_is_reset(impatient: Server, google: ModuleType) -> None:
    message = frame_message(make_image_request(google, b"a").SerializeToString())
    with Http2Client(impatient, window_bytes=0) as client:
        client.request(message, INFER, content_type="application/grpc", te="trailers")

        assert impatient.wait_for_line(DROPPED).groups() == ("1", "1")


def test_responses_that_nobody_reads_leave_the_byte_budget_to_others() -> None:
    """The bodies of the unread requests, and then their responses, are as large as the budget."""
    with (
        run_server(ECHO, "--max_queue_bytes=1000000") as server,
        Http2Client(server, window_bytes=0) as client,
        ExitStack() as stack,
    ):
        for number in range(1, 5):
            client.request(make_echo_request(200_000))
            wait_for_answers(server, number)
        assert server.predict(make_echo_request(900_000)).status_code == 200

        for _ in range(5):
            connection = stack.enter_context(connect_with_small_buffer(server))
            connection.sendall(make_http1_request(make_echo_request(900_000)))
        assert [server.predict(make_echo_request(400_000)).status_code for _ in range(5)] == [200] * 5


def test_a_body_leaves_the_byte_budget_when_its_response_begins() -> None:
    with run_server(ECHO, "--max_queue_bytes=1000000") as server, Http2Client(server, window_bytes=0) as client:
        unread = client.request(make_echo_request(1).ljust(900_000))
        wait_for_answers(server, 1)
        assert server.predict(b"[]".ljust(900_000)).status_code == 400  # which is no 503

        client.open_window(unread)
        client.wait_for(h2.events.StreamEnded, unread)


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "pipelined", "HTTP/2"])
@pytest.mark.slow
def test_a_client_that_does_not_read_holds_a_stop_no_longer_than_its_send_timeout(protocol: str) -> None:
    with run_server(ECHO, "--send_timeout_seconds=4", "--grace_period_seconds=40") as server, ExitStack() as stack:
        if protocol == "HTTP/2":
            client = stack.enter_context(Http2Client(server, window_bytes=0))
            client.request(b'{"instances": [1]}')
            wait_for_answers(server, 1)
        else:
            unread = stack.enter_context(connect_with_small_buffer(server))
            unread.sendall(PIPELINED if protocol == "pipelined" else make_http1_request(LARGE))
            unread.recv(1)
            for _ in range(100):  # in turn with pipelined requests, of which about 50 fill the socket
                server.get("/")
        started_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started_at < 20  # it is 4 to 5 s

    assert not [line for line in server.log if "Traceback" in line]


def test_a_response_that_is_cut_by_the_end_of_the_grace_period_is_counted_as_unanswered() -> None:
    with (
        run_server(ECHO, "--grace_period_seconds=2") as server,
        connect_with_small_buffer(server) as slow,
        ThreadPoolExecutor() as threads,
    ):
        slow.sendall(make_http1_request(LARGE))
        slow.recv(1)
        server.process.send_signal(signal.SIGTERM)
        exit_code = threads.submit(server.wait)
        with suppress(ConnectionResetError):
            while slow.recv(20_000):
                time.sleep(0.1)  # what is tested is a client that reads slowly
        assert exit_code.result() == 8

    assert server.log[-1] == "pinnace: stopped at the end of --grace_period_seconds with 1 requests unanswered\n"
    assert not [line for line in server.log if "Traceback" in line]
