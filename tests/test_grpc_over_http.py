"""gRPC on the HTTP port, where it differs from the other port's: what grpc.aio does there is our own code here.

That both answer the same is seen by the tests with the `channel` fixture, which run on both.
"""

from __future__ import annotations

import asyncio
import gzip
import signal
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import create_connection
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from tests.callers import INFER
from tests.pictures import CAT, v1_request
from tests.servers import Server, gated, running
from tests.test_grpc import image_request
from tests.test_lifecycle import STOPPING
from tests.test_metrics import ended, wait_for

LIVE = "/inference.GRPCInferenceService/ServerLive"
ECHO = "--predictor=tests.predictors:Echo"
ROOMY = 64 * 1024 * 1024


@pytest.fixture
def one_port(server: Server) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        yield channel


def call(channel: grpc.Channel, message: bytes, method: str = INFER, **options: Any) -> bytes:
    unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    return unary(message, **{"timeout": 60, **options})


def code_of(channel: grpc.Channel, message: bytes, method: str = INFER, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(grpc.RpcError) as error:
        call(channel, message, method, **options)
    return error.value.code().name, error.value.details()


def frame(message: bytes, compressed: bool = False) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


def raw_call(
    server: Server, body: bytes, path: str = INFER, end: bool = True, port: int = 0, **headers: str
) -> dict[str, str]:
    """A call by hand; headers and trailers, which httpx keeps to itself, are read off the connection."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    trailers: dict[str, str] = {}
    with create_connection(("127.0.0.1", port or server.http_port), timeout=30) as socket:
        connection.initiate_connection()
        pseudo = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "")]
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        connection.send_headers(1, [*pseudo, ("content-type", "application/grpc"), ("te", "trailers"), *named])
        for start in range(0, len(body), 16384):
            connection.send_data(1, body[start : start + 16384])
        if end:
            connection.end_stream(1)
        socket.sendall(connection.data_to_send())
        while True:
            for event in connection.receive_data(socket.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    trailers |= dict(event.headers)  # type: ignore[arg-type]
                if isinstance(event, h2.events.StreamEnded):
                    return trailers
            socket.sendall(connection.data_to_send())


def test_five_thousand_calls_over_one_channel_are_all_answered(one_port: grpc.Channel) -> None:
    answers = [call(one_port, b"", LIVE) for _ in range(5000)]

    assert answers == [b"\x08\x01"] * 5000


async def test_calls_at_once_over_one_channel_are_all_answered(server: Server, google: ModuleType) -> None:
    request = image_request(google, CAT).SerializeToString()
    expected = server.predict(v1_request(CAT)).json()["predictions"][0]

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        answers = await asyncio.gather(*(unary(request, timeout=60) for _ in range(120)))

    for answer in answers:
        assert list(google.ModelInferResponse.FromString(answer).outputs[0].contents.fp32_contents) == expected


def test_rest_and_grpc_share_the_port(server: Server, one_port: grpc.Channel) -> None:
    assert call(one_port, b"", LIVE) == b"\x08\x01"
    with httpx.Client(http1=False, http2=True) as client:
        assert client.get(f"{server.url}/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/live").json() == {"live": True}


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_read(
    compression: grpc.Compression, server: Server, google: ModuleType, one_port: grpc.Channel
) -> None:
    answer = call(one_port, image_request(google, CAT).SerializeToString(), compression=compression)

    expected = server.predict(v1_request(CAT)).json()["predictions"][0]
    assert list(google.ModelInferResponse.FromString(answer).outputs[0].contents.fp32_contents) == expected


def test_a_message_that_grows_beyond_the_limit_when_unpacked_is_refused(one_port: grpc.Channel) -> None:
    code, details = code_of(one_port, bytes(ROOMY), compression=grpc.Compression.Gzip)

    assert (code, details) == ("RESOURCE_EXHAUSTED", "SERVER: Decompressed message larger than max (8388608)")


@pytest.mark.parametrize(
    ("body", "headers", "code", "message"),
    [
        (b"", {}, grpc.StatusCode.INVALID_ARGUMENT, "the call has no message"),
        (b"\0\0", {}, grpc.StatusCode.INVALID_ARGUMENT, "the call ends in the middle of a message"),
        (frame(b"abc")[:-1], {}, grpc.StatusCode.INVALID_ARGUMENT, "the call ends in the middle of a message"),
        (b"\0\xff\xff\xff\xff", {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (42"),
        (frame(b"abc", True), {"grpc_encoding": "snappy"}, grpc.StatusCode.UNIMPLEMENTED, "messages are read as they"),
        (frame(b"abc", True), {"grpc_encoding": "gzip"}, grpc.StatusCode.INVALID_ARGUMENT, "a compressed message is d"),
        (
            frame(gzip.compress(b"abc", mtime=0)[:-4], True),
            {"grpc_encoding": "gzip"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "a compressed message is truncated",
        ),
        (frame(b"\xff"), {}, grpc.StatusCode.INVALID_ARGUMENT, "not a ModelInferRequest message: truncated varint"),
    ],
)
def test_a_call_that_is_not_framed_as_it_must_be_ends_with_a_status(
    body: bytes, headers: dict[str, str], code: grpc.StatusCode, message: str, server: Server
) -> None:
    trailers = raw_call(server, body, INFER, True, 0, **headers)

    assert trailers["grpc-status"] == str(code.value[0])
    assert trailers["grpc-message"].startswith(message)


def test_a_text_beyond_ascii_travels_in_the_status(server: Server, google: ModuleType, one_port: grpc.Channel) -> None:
    code, details = code_of(one_port, image_request(google, CAT, model_name="Grüße 100 %").SerializeToString())

    assert (code, details) == ("NOT_FOUND", "Model with name Grüße 100 % does not exist.")


@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/Nope", "/no.Such/Method", "/"])
def test_an_unknown_method_is_unimplemented(path: str, server: Server) -> None:
    trailers = raw_call(server, frame(bytes(60_000)), path)

    assert (trailers["grpc-status"], trailers["grpc-message"]) == ("12", "Method not found!")


def test_a_large_message_to_an_unknown_method_spares_the_other_calls(one_port: grpc.Channel) -> None:
    for _ in range(5):
        assert code_of(one_port, bytes(5_000_000), "/no.Such/Method") == ("UNIMPLEMENTED", "Method not found!")
        assert call(one_port, b"", LIVE) == b"\x08\x01"


def test_an_answer_over_the_limit_is_refused(google: ModuleType) -> None:
    with (
        running(ECHO, "--grpc_max_send_message_length=1000") as server,
        grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel,
    ):
        code, _ = code_of(channel, image_request(google, bytes(2000)).SerializeToString())

    assert code == "RESOURCE_EXHAUSTED"


def test_a_call_ends_at_its_deadline(tmp_path: Path, gate: Callable[[str], Path], google: ModuleType) -> None:
    held = gate("held")
    with gated(tmp_path) as server, grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        request = image_request(google, b"held").SerializeToString()
        with ThreadPoolExecutor() as clients:
            answer = clients.submit(code_of, channel, request, timeout=3)
            with held.open("wb"):
                assert answer.result()[0] == "DEADLINE_EXCEEDED"
                wait_for(lambda: ended(server) == {("grpc", "cancelled"): 1}, server)


def test_a_call_that_its_client_cancels_is_given_up(
    tmp_path: Path, gate: Callable[[str], Path], google: ModuleType
) -> None:
    held = gate("held")
    with gated(tmp_path) as server, grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        pending = unary.future(image_request(google, b"held").SerializeToString(), timeout=60)
        with held.open("wb"):
            pending.cancel()
            wait_for(lambda: ended(server) == {("grpc", "cancelled"): 1}, server)


def test_calls_in_flight_are_answered_before_the_end(
    tmp_path: Path, gate: Callable[[str], Path], google: ModuleType
) -> None:
    held = gate("held")
    with (
        gated(tmp_path) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel,
        ThreadPoolExecutor() as clients,
    ):
        answer = clients.submit(call, channel, image_request(google, b"held").SerializeToString())
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_line(STOPPING)[1] == "1"
        outputs = google.ModelInferResponse.FromString(answer.result()).outputs
        assert list(outputs[0].contents.bytes_contents) == [b"held"]
        assert server.wait() == 0


def test_calls_that_end_in_every_way_leave_no_connection_behind(server: Server, google: ModuleType) -> None:
    server.get("/")
    before = server.descriptors()

    for _ in range(20):
        raw_call(server, b"\0\0")
        raw_call(server, frame(bytes(50_000)), "/no.Such/Method")
        with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
            call(channel, b"", LIVE)

    server.wait_for_descriptors(before)


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_message_that_comes_too_slowly_ends_its_call_on_either_port(port: str) -> None:
    with running(ECHO, "--read_timeout_seconds=1") as server:
        trailers = raw_call(server, frame(bytes(1000))[:500], end=False, port=getattr(server, port))

    assert trailers["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    assert trailers["grpc-message"] == "the request was not received within read_timeout_seconds (1)"
