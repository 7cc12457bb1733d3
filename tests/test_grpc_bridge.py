"""pinnace/http/grpc_bridge.py: gRPC on the HTTP port, where our own code does what grpc.aio does on the gRPC port.

Tests with the fixture `channel` run on both ports, and check that both answer alike.
"""

from __future__ import annotations

import asyncio
import gzip
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from tests.support.clients import INFER, frame_message, make_image_request, make_v1_request, send_raw_call
from tests.support.metrics import requests_by_outcome
from tests.support.pictures import CAT
from tests.support.raw_grpc import HEADERS, RawConnection
from tests.support.servers import STOPPING, Server, run_gated_server, run_server
from tests.support.waiting import wait_for

LIVE = "/inference.GRPCInferenceService/ServerLive"
WATCH = "/grpc.health.v1.Health/Watch"
ECHO = "--predictor=tests.support.predictors:Echo"
LARGE_BYTES = 64 * 1024 * 1024


@pytest.fixture
def http_channel(server: Server) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        yield channel


def call_method(channel: grpc.Channel, message: bytes, method: str = INFER, **options: Any) -> bytes:
    unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    return unary(message, **{"timeout": 60, **options})


def expect_error(channel: grpc.Channel, message: bytes, method: str = INFER, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(grpc.RpcError) as error:
        call_method(channel, message, method, **options)
    return error.value.code().name, error.value.details()


@pytest.mark.slow
def test_five_thousand_calls_over_one_channel_are_answered(http_channel: grpc.Channel) -> None:
    answers = [call_method(http_channel, b"", LIVE) for _ in range(5000)]

    assert answers == [b"\x08\x01"] * 5000


async def test_concurrent_calls_over_one_channel_are_answered(server: Server, google: ModuleType) -> None:
    request = make_image_request(google, CAT).SerializeToString()
    expected = server.predict(make_v1_request(CAT)).json()["predictions"][0]

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        answers = await asyncio.gather(*(unary(request, timeout=60) for _ in range(120)))

    for answer in answers:
        assert list(google.ModelInferResponse.FromString(answer).outputs[0].contents.fp32_contents) == expected


def test_rest_and_grpc_share_the_port(server: Server, http_channel: grpc.Channel) -> None:
    assert call_method(http_channel, b"", LIVE) == b"\x08\x01"
    with httpx.Client(http1=False, http2=True) as client:
        assert client.get(f"{server.url}/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/live").json() == {"live": True}


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_read(
    compression: grpc.Compression, server: Server, google: ModuleType, http_channel: grpc.Channel
) -> None:
    answer = call_method(http_channel, make_image_request(google, CAT).SerializeToString(), compression=compression)

    expected = server.predict(make_v1_request(CAT)).json()["predictions"][0]
    assert list(google.ModelInferResponse.FromString(answer).outputs[0].contents.fp32_contents) == expected


def test_a_message_that_is_larger_than_the_limit_when_decompressed_is_refused(http_channel: grpc.Channel) -> None:
    code, details = expect_error(http_channel, bytes(LARGE_BYTES), compression=grpc.Compression.Gzip)

    assert (code, details) == ("RESOURCE_EXHAUSTED", "SERVER: Decompressed message larger than max (8388608)")


@pytest.mark.parametrize(
    ("body", "headers", "code", "message"),
    [
        (b"", {}, grpc.StatusCode.INVALID_ARGUMENT, "the call has no message"),
        (b"\0\0", {}, grpc.StatusCode.INVALID_ARGUMENT, "the call ends in the middle of a message"),
        (frame_message(b"abc")[:-1], {}, grpc.StatusCode.INVALID_ARGUMENT, "the call ends in the middle of a message"),
        (b"\0\xff\xff\xff\xff", {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (42"),
        (
            frame_message(b"abc", True),
            {"grpc_encoding": "snappy"},
            grpc.StatusCode.UNIMPLEMENTED,
            "messages must be uncompressed",
        ),
        (
            frame_message(b"abc", True),
            {"grpc_encoding": "gzip"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "a compressed message is d",
        ),
        (
            frame_message(gzip.compress(b"abc", mtime=0)[:-4], True),
            {"grpc_encoding": "gzip"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "a compressed message is truncated",
        ),
        (
            frame_message(b"\xff"),
            {},
            grpc.StatusCode.INVALID_ARGUMENT,
            "not a ModelInferRequest message: truncated varint",
        ),
    ],
)
def test_a_badly_framed_call_ends_with_a_status(
    body: bytes, headers: dict[str, str], code: grpc.StatusCode, message: str, server: Server
) -> None:
    trailers = send_raw_call(server, body, INFER, True, 0, **headers)

    assert trailers["grpc-status"] == str(code.value[0])
    assert trailers["grpc-message"].startswith(message)


def test_the_details_of_a_status_can_be_non_ascii(
    server: Server, google: ModuleType, http_channel: grpc.Channel
) -> None:
    code, details = expect_error(
        http_channel, make_image_request(google, CAT, model_name="Grüße 100 %").SerializeToString()
    )

    assert (code, details) == ("NOT_FOUND", "Model with name Grüße 100 % does not exist.")


@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/Nope", "/no.Such/Method", "/"])
def test_an_unknown_method_is_unimplemented(path: str, server: Server) -> None:
    trailers = send_raw_call(server, frame_message(bytes(60_000)), path)

    assert (trailers["grpc-status"], trailers["grpc-message"]) == ("12", "Method not found!")


def test_a_large_message_to_an_unknown_method_does_not_affect_other_calls(http_channel: grpc.Channel) -> None:
    for _ in range(5):
        assert expect_error(http_channel, bytes(5_000_000), "/no.Such/Method") == ("UNIMPLEMENTED", "Method not found!")
        assert call_method(http_channel, b"", LIVE) == b"\x08\x01"


def test_a_response_over_the_limit_gets_resource_exhausted(google: ModuleType) -> None:
    with (
        run_server(ECHO, "--grpc_max_send_message_length=1000") as server,
        grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel,
    ):
        code, _ = expect_error(channel, make_image_request(google, bytes(2000)).SerializeToString())

    assert code == "RESOURCE_EXHAUSTED"


def test_a_call_ends_at_its_deadline(tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path) as server, grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        request = make_image_request(google, b"held").SerializeToString()
        with ThreadPoolExecutor() as clients:
            answer = clients.submit(expect_error, channel, request, timeout=3)
            with held.open("wb"):
                assert answer.result()[0] == "DEADLINE_EXCEEDED"
                wait_for(lambda: requests_by_outcome(server) == {("grpc", "cancelled"): 1}, "one cancelled call")


def test_a_call_that_its_client_cancels_is_cancelled_in_the_server(
    tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path) as server, grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        pending = unary.future(make_image_request(google, b"held").SerializeToString(), timeout=60)
        with held.open("wb"):
            pending.cancel()
            wait_for(lambda: requests_by_outcome(server) == {("grpc", "cancelled"): 1}, "one cancelled call")


def test_calls_in_flight_are_answered_before_the_server_stops(
    tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    held = make_gate("held")
    with (
        run_gated_server(tmp_path) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel,
        ThreadPoolExecutor() as clients,
    ):
        answer = clients.submit(call_method, channel, make_image_request(google, b"held").SerializeToString())
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_line(STOPPING)[1] == "1"
        outputs = google.ModelInferResponse.FromString(answer.result()).outputs
        assert list(outputs[0].contents.bytes_contents) == [b"held"]
        assert server.wait() == 0


def test_failed_and_successful_calls_leave_no_connection_open(server: Server, google: ModuleType) -> None:
    server.get("/")
    before = server.count_descriptors()

    for _ in range(20):
        send_raw_call(server, b"\0\0")
        send_raw_call(server, frame_message(bytes(50_000)), "/no.Such/Method")
        with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel:
            call_method(channel, b"", LIVE)

    server.wait_for_descriptors(before)


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_message_that_arrives_too_slowly_ends_its_call_on_either_port(port: str) -> None:
    with run_server(ECHO, "--read_timeout_seconds=1") as server:
        trailers = send_raw_call(server, frame_message(bytes(1000))[:500], end=False, port=getattr(server, port))

    assert trailers["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    assert trailers["grpc-message"] == "the request was not received within read_timeout_seconds (1)"


def test_a_call_without_te_trailers_gets_its_status(server: Server) -> None:
    with RawConnection(server.http_port) as connection:
        stream = connection.call(LIVE, b"", headers=(("content-type", "application/grpc"),))

        assert connection.wait_for_status(stream) is grpc.StatusCode.OK


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_streaming_call_that_fails_at_once_ends_at_once_on_either_port(port: str, server: Server) -> None:
    with RawConnection(getattr(server, port)) as connection:
        started_at = time.monotonic()
        streams = [connection.call(WATCH, b"\xff", end=False) for _ in range(10)]

        for stream in streams:
            assert connection.wait_for_status(stream) is grpc.StatusCode.INVALID_ARGUMENT
        assert time.monotonic() - started_at < 4  # the rest of the call was waited for: 5 s


def test_a_call_that_has_next_to_no_time_left_is_not_begun(google: ModuleType) -> None:
    message = make_image_request(google, b"a").SerializeToString()
    with run_server(ECHO) as server, RawConnection(server.http_port) as connection:
        stream = connection.call(INFER, message, headers=(*HEADERS, ("grpc-timeout", "1m")))

        assert connection.wait_for_status(stream) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert requests_by_outcome(server) == {}
