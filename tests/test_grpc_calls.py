"""pinnace/grpc/calls.py: responses of the gRPC port that their clients do not take, and the end of the port."""

from __future__ import annotations

import re
import time
from types import ModuleType
from typing import Any

import grpc
import h2.events

from tests.support.clients import INFER, call_grpc, make_image_request
from tests.support.raw_grpc import RawConnection
from tests.support.servers import Server, run_server
from tests.support.waiting import wait_for

LARGE = "--predictor=tests.support.predictors:Large"
LIVE = "/inference.GRPCInferenceService/ServerLive"


def ask_without_reading(connection: RawConnection, google: ModuleType, num_calls: int = 1) -> None:
    """Send calls whose responses of a million bytes the client does not take, and wait until the server has them.

    Other calls go before and after: grpc.aio keeps its first call and its last one.
    """
    for is_last in (False, True):
        with grpc.insecure_channel(f"127.0.0.1:{connection.port}") as channel:
            live: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(LIVE)
            live(b"", timeout=10)
        if is_last:
            return
        for _ in range(num_calls):
            stream = connection.call(INFER, make_image_request(google, b"a").SerializeToString())
            connection.wait_for(h2.events.ResponseReceived, stream)


def status_of(trailers: h2.events.TrailersReceived) -> grpc.StatusCode:
    headers: Any = dict(trailers.headers)
    return next(code for code in grpc.StatusCode if str(code.value[0]) == headers["grpc-status"])


def test_a_response_that_is_not_taken_in_time_ends_its_call_and_no_other(google: ModuleType) -> None:
    with (
        run_server(LARGE, "--send_timeout_seconds=1") as server,
        RawConnection(server.grpc_port, window_bytes=0) as connection,
    ):
        ask_without_reading(connection, google)

        trailers = connection.wait_for(h2.events.TrailersReceived)
        assert (trailers.stream_id, status_of(trailers)) == (1, grpc.StatusCode.CANCELLED)
        assert server.wait_for_line(re.compile("1 gRPC calls ended: their responses were not taken"))
        assert not connection.has_received(h2.events.ConnectionTerminated)


def test_responses_that_are_not_taken_count_as_bytes_and_are_ended_when_bytes_are_needed(google: ModuleType) -> None:
    with (
        run_server(LARGE, "--max_queue_bytes=5000000") as server,
        RawConnection(server.grpc_port, window_bytes=0) as connection,
    ):
        ask_without_reading(connection, google, 4)  # four responses fit, and five do not

        wait_for(lambda: try_inference(server, google), "an answer")
        trailers = connection.wait_for(h2.events.TrailersReceived)
        assert (trailers.stream_id, status_of(trailers)) == (1, grpc.StatusCode.CANCELLED)
        assert server.wait_for_line(re.compile("1 gRPC calls ended: .* max_queue_bytes"))


def try_inference(server: Server, google: ModuleType) -> bool:
    """Return whether a call is answered, not refused."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        try:
            call_grpc(channel, google, "ModelInfer", make_image_request(google, b"a"))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return True


def test_a_client_that_acknowledges_no_ping_does_not_hold_up_the_stop(google: ModuleType) -> None:
    with (
        run_server(LARGE) as server,
        RawConnection(server.grpc_port, acknowledges_pings=False) as connection,
    ):
        live = connection.call(LIVE, b"")
        connection.wait_for(h2.events.StreamEnded, live)

        started_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started_at < 8  # grpc itself waits 20 s


def test_a_response_that_is_not_taken_until_the_end_of_the_grace_period_is_unanswered(google: ModuleType) -> None:
    with (
        run_server(LARGE, "--grace_period_seconds=2") as server,
        RawConnection(server.grpc_port, window_bytes=0) as connection,
    ):
        ask_without_reading(connection, google)

        assert server.stop() == 8
    assert server.log[-1].strip().endswith("stopped at the end of --grace_period_seconds with 1 requests unanswered")


def test_clients_that_disconnect_before_they_take_their_responses_leave_no_traceback(google: ModuleType) -> None:
    with run_server(LARGE) as server:
        with RawConnection(server.grpc_port, window_bytes=0) as connection:
            ask_without_reading(connection, google, 20)
        assert server.stop() == 0

    assert not [line for line in server.log if "Traceback" in line]
