"""pinnace/http/hypercorn_http2.py: malformed requests and floods of frames on one connection of HTTP/2."""

from __future__ import annotations

import re
import select
import socket
from contextlib import suppress
from types import ModuleType
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx
import pytest
from hpack import Encoder

from pinnace.http.hypercorn_http2 import Http2Config, Http2Connection
from tests.attacks.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOODS,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frames,
    make_frame,
    take_chunk,
)
from tests.support.clients import PREDICT, call_grpc
from tests.support.servers import Server, run_server

Headers = list[tuple[bytes, bytes]]

ECHO = "--predictor=tests.support.predictors:Echo"
REQUEST = [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"x")]
NO_METHOD, NO_PATH, NO_AUTHORITY = REQUEST[1:], [REQUEST[0], *REQUEST[2:]], REQUEST[:3]
CONNECT = [(b":method", b"CONNECT"), (b":authority", b"other:443")]
EXTENDED_CONNECT = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *REQUEST[1:]]
LOWER_CASE_CONNECT = [(b":method", b"connect"), *REQUEST[1:]]
CLOSED = re.compile(r"HTTP/2 connection of .* closed: ENHANCE_YOUR_CALM")

MALFORMED = {
    "a blank at the end of a value": [*REQUEST, (b"x", b"value ")],
    "a line break in a value": [*REQUEST, (b"x", b"a\nb")],
    "a name in upper case": [*REQUEST, (b"X-Name", b"value")],
    "a name without characters": [*REQUEST, (b"", b"value")],
    "a field of HTTP/1.1": [*REQUEST, (b"connection", b"close")],
    "te": [*REQUEST, (b"te", b"gzip")],
    "no method": NO_METHOD,
    "no path": NO_PATH,
    "no authority": NO_AUTHORITY,
    "two methods": [*REQUEST, REQUEST[0]],
    "an unknown pseudo-header": [*REQUEST, (b":unknown", b"x")],
    "a pseudo-header after a field": [*NO_METHOD, (b"x", b"y"), REQUEST[0]],
    "a final status": [*REQUEST, (b":status", b"200")],
    "a content-length that is no number": [*REQUEST, (b"content-length", b"x")],
    "two content-lengths": [*REQUEST, (b"content-length", b"1"), (b"content-length", b"2")],
    "a content-length without a body": [*REQUEST, (b"content-length", b"1")],
    "a method that is not ASCII": [(b":method", b"G\xc3\x89T"), *NO_METHOD],
    "a path that is not ASCII": [*NO_PATH, (b":path", b"/\xff")],
    "an authority beside another host": [*REQUEST, (b"host", b"y")],
}


class Client:
    """A client that can send any header block, and records what it receives."""

    def __init__(self, connection: socket.socket) -> None:
        config = h2.config.H2Configuration(
            header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.http2 = h2.connection.H2Connection(config)
        self.http2.initiate_connection()
        self.events: list[Any] = []
        self._socket = connection

    def send(self, *frames: bytes) -> None:
        """Send what h2 has written, then these frames."""
        self._socket.sendall(self.http2.data_to_send() + b"".join(frames))

    def request(self, stream_id: int, headers: Headers = REQUEST, end_stream: bool = True) -> None:
        """Send the header block of a request."""
        self.http2.send_headers(stream_id, headers, end_stream=end_stream)
        self.send()

    def wait_until_ended(self, *stream_ids: int) -> None:
        """Receive until these streams have ended or are reset."""
        while not {*stream_ids} <= {event.stream_id for event in self.of(h2.events.StreamEnded, h2.events.StreamReset)}:
            self._receive()

    def wait_until_closed(self) -> None:
        """Receive until the server closes the connection."""
        with suppress(ConnectionError):
            while self._receive():
                pass

    def of(self, *kinds: type[h2.events.Event]) -> list[Any]:
        """Return the events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    def resets(self) -> list[tuple[int, int]]:
        """Return the streams that the server has reset, with the codes."""
        return [(event.stream_id, event.error_code) for event in self.of(h2.events.StreamReset)]

    def statuses(self) -> dict[int, str]:
        """Return the status of each response."""
        return {event.stream_id: dict(event.headers)[":status"] for event in self.of(h2.events.ResponseReceived)}

    def _receive(self) -> bool:
        data = self._socket.recv(65536)
        self.events += self.http2.receive_data(data)
        return bool(data)


@pytest.mark.parametrize("end_stream", [True, False])
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_resets_its_stream_only(name: str, end_stream: bool, server: Server) -> None:
    if name == "a content-length without a body" and not end_stream:
        pytest.skip("the body may follow")
    with server.connect() as connection:
        client = Client(connection)
        client.request(1, end_stream=False)
        client.request(3, MALFORMED[name], end_stream)
        client.http2.end_stream(1)
        client.request(5)
        client.wait_until_ended(1, 3, 5)

    assert client.resets() == [(3, h2.errors.ErrorCodes.PROTOCOL_ERROR)]
    assert client.statuses() == {1: "200", 5: "200"}


def test_a_body_of_another_length_than_declared_resets_its_stream_only(server: Server) -> None:
    """Check that the window that a body used is given back: a hundred of them would use it up."""
    headers = [(b":method", b"POST"), (b":path", PREDICT.encode()), *REQUEST[2:], (b"content-length", b"10")]
    streams = range(1, 201, 2)
    with server.connect() as connection:
        client = Client(connection)
        for stream_id in streams:
            client.request(stream_id, headers, end_stream=False)
            client.send(make_frame(DATA, stream_id, bytes(10_000)))
            client.wait_until_ended(stream_id)
        client.request(201)
        client.wait_until_ended(201)

    assert client.resets() == [(stream_id, h2.errors.ErrorCodes.PROTOCOL_ERROR) for stream_id in streams]
    assert client.statuses() == {201: "200"}


def test_trailers_that_do_not_end_the_request_reset_its_stream_only(server: Server) -> None:
    with server.connect() as connection:
        client = Client(connection)
        client.request(1, end_stream=False)
        client.send(make_frame(HEADERS, 1, client.http2.encoder.encode([("x", "y")]), END_HEADERS))
        client.request(3)
        client.wait_until_ended(1, 3)

    assert client.resets() == [(1, h2.errors.ErrorCodes.PROTOCOL_ERROR)]
    assert client.statuses()[3] == "200"


def test_a_window_update_of_zero_resets_its_stream_only(server: Server) -> None:
    with server.connect() as connection:
        client = Client(connection)
        client.request(1, end_stream=False)
        client.send(make_frame(WINDOW_UPDATE, 1, bytes(4)))
        client.request(3)
        client.wait_until_ended(1, 3)

    assert client.resets() == [(1, h2.errors.ErrorCodes.PROTOCOL_ERROR)]
    assert client.statuses()[3] == "200"


def test_a_header_block_that_cannot_be_decoded_closes_the_connection(server: Server) -> None:
    with server.connect() as connection:
        client = Client(connection)
        client.send(make_frame(HEADERS, 1, b"\xff\xff\xff\xff", END_HEADERS | END_STREAM))
        client.wait_until_closed()

    assert client.of(h2.events.ConnectionTerminated)


@pytest.mark.parametrize("end_stream", [True, False])
@pytest.mark.parametrize("headers", [CONNECT, EXTENDED_CONNECT, LOWER_CASE_CONNECT])
def test_connect_is_not_allowed_and_the_requests_beside_it_are_answered(
    headers: Headers, end_stream: bool, server: Server
) -> None:
    with server.connect() as connection:
        client = Client(connection)
        client.request(1, end_stream=False)
        client.request(3, headers, end_stream)
        client.http2.end_stream(1)
        client.request(5)
        client.wait_until_ended(1, 3, 5)

    assert client.statuses() == {1: "200", 3: "405", 5: "200"}


def test_a_grpc_call_with_a_blank_at_the_end_of_its_metadata_ends_alone(server: Server, google: ModuleType) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        method = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerLive",
            google.ServerLiveRequest.SerializeToString,
            google.ServerLiveResponse.FromString,
        )
        good = [method.future(google.ServerLiveRequest()) for _ in range(10)]
        with pytest.raises(grpc.RpcError):
            method(google.ServerLiveRequest(), metadata=(("name", "value "),))
        assert all(call.result().live for call in good)


@pytest.mark.slow
def test_a_stream_too_many_is_refused_and_the_others_are_answered(server: Server) -> None:
    with server.connect() as connection:
        client = Client(connection)
        for stream_id in range(1, 2001, 2):
            client.http2.send_headers(stream_id, REQUEST)
        client.send()
        client.request(2001)
        client.wait_until_ended(2001)
        client.http2.end_stream(1)
        client.send()
        client.wait_until_ended(1)

    assert client.resets() == [(2001, h2.errors.ErrorCodes.REFUSED_STREAM)]
    assert client.statuses()[1] == "200"


@pytest.mark.parametrize("end_stream", [0, END_STREAM])
def test_a_request_with_an_interim_status_resets_its_stream_only(end_stream: int) -> None:
    connection = Http2Connection(Http2Config())
    connection.initiate_connection()
    connection.receive_data(PREFACE + make_frame(SETTINGS))
    connection.data_to_send()
    block = Encoder().encode([(b":status", b"100"), *REQUEST])

    (event,) = connection.receive_data(make_frame(HEADERS, 1, block, END_HEADERS | end_stream))

    assert isinstance(event, h2.events.StreamReset)
    code = h2.errors.ErrorCodes.PROTOCOL_ERROR
    assert connection.data_to_send() == make_frame(RST_STREAM, 1, code.to_bytes(4, "big"))


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_frames_closes_its_connection(name: str, server: Server) -> None:
    with server.connect() as connection:
        flood(connection, FLOODS[name]())
    server.wait_for_line(CLOSED)

    assert server.get("/v2/health/live").status_code == 200


def flood(connection: socket.socket, frames: Frames) -> None:
    """Send frames until the server has closed the connection."""
    with suppress(OSError):
        connection.sendall(PREFACE + make_frame(SETTINGS))
        while True:
            connection.sendall(take_chunk(frames))
            if select.select([connection], [], [], 0)[0]:
                connection.recv(1024 * 1024)


def test_a_client_that_floods_is_told_to_calm_down(server: Server) -> None:
    with server.connect() as connection:
        client = Client(connection)
        client.send(take_chunk(FLOODS["PING"]()))
        client.wait_until_closed()

    (event,) = client.of(h2.events.ConnectionTerminated)
    assert event.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


def test_a_stop_does_not_wait_for_connections_without_a_request() -> None:
    with (
        run_server(ECHO, "--grace_period_seconds=600") as server,
        server.connect() as new,
        server.connect() as flooding,
        server.connect() as resetting,
    ):
        for connection in (new, flooding, resetting):
            connection.sendall(PREFACE + make_frame(SETTINGS))
        flooding.sendall(make_frame(SETTINGS) * 500)
        client = Client(resetting)
        client.http2.clear_outbound_data_buffer()
        client.request(1, end_stream=False)
        client.http2.reset_stream(1)
        client.request(3)
        client.http2.reset_stream(3)
        client.send()
        assert server.get("/").status_code == 200
        assert server.stop() == 0

    assert not [line for line in server.log if "Traceback" in line]


@pytest.mark.slow
def test_good_clients_do_not_use_up_their_control_frames(google: ModuleType) -> None:
    """A reader of many answers opens its windows for each, and pings; a writer of large bodies does not wait."""
    with (
        run_server(ECHO, "--max_body_bytes=100000000") as server,
        httpx.Client(base_url=server.url, http1=False, http2=True, timeout=60) as client,
        grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel,
    ):
        for _ in range(1500):
            assert call_grpc(channel, google, "ServerLive", google.ServerLiveRequest()).live
        text = "x" * 5_000_000
        for _ in range(3):
            assert client.post(PREDICT, json={"instances": [text]}).json() == {"predictions": [text]}
        assert server.stop() == 0

    assert not [line for line in server.log if CLOSED.search(line)]
