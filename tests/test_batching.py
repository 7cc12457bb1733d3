"""pinnace/inference/batching.py: which requests share a run, and what one of them does to the others."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from pinnace.errors import InvalidInput
from pinnace.inference.batch import PreprocessedRequest
from pinnace.inference.batching import PIPELINE_DEPTH, Batcher
from pinnace.inference.scheduler import Scheduler
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import RequestTimings
from tests.support.clients import make_image_request
from tests.support.metrics import metric_value, requests_by_outcome, wait_for_metric
from tests.support.servers import Server, run_server
from tests.support.waiting import wait_for
from tests.unit.inference import Steps

BATCH_SIZE = "--predictor=tests.support.predictors:BatchSize"
ALL_CORES = "--predictor=tests.support.predictors:AllCores"
MODEL = "custom-model"


@pytest.fixture
def server() -> Iterator[Server]:
    with run_server(BATCH_SIZE, "--max_batch_size=4") as server:
        yield server


def send_rows(server: Server, *instances: Any) -> Any:
    """Send one V1 request, and return the batch size in which each instance ran, or the status of an error."""
    response = server.predict(json.dumps({"instances": instances}))
    return response.json().get("predictions", response.status_code)


@contextmanager
def hold_model(server: Server, make_gate: Callable[[str], Path]) -> Iterator[Callable[..., Future[Any]]]:
    """Hold the model in a run of one row. Yield a function that submits a request and waits until it is queued."""
    held = make_gate("held")
    with ThreadPoolExecutor(32) as clients:
        first = clients.submit(send_rows, server, str(held))
        waiting = 1
        with held.open("wb"):

            def submit(*instances: Any) -> Future[Any]:
                nonlocal waiting
                answer = clients.submit(send_rows, server, *instances)
                waiting += 1
                wait_for_metric(server, "pinnace_requests_queued_or_running", waiting)
                return answer

            yield submit
        assert first.result() == [1]


def test_a_request_that_finds_the_model_idle_runs_at_once_and_alone(server: Server) -> None:
    assert send_rows(server, "a") == [1]
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="idle") == 1


def test_requests_that_arrive_during_a_run_share_the_next_one(server: Server, make_gate: Callable[[str], Path]) -> None:
    with hold_model(server, make_gate) as submit:
        answers = [submit(name) for name in "abc"]

    assert [answer.result() for answer in answers] == [[3]] * 3
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="queued") == 1
    assert metric_value(server, "pinnace_batch_rows_sum", model_name=MODEL) == 4


def test_a_run_has_at_most_max_batch_size_rows(server: Server, make_gate: Callable[[str], Path]) -> None:
    with hold_model(server, make_gate) as submit:
        answers = [submit(name) for name in "abcdef"]

    assert [answer.result() for answer in answers] == [[4]] * 4 + [[2]] * 2
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="full") == 1


def test_max_batch_size_counts_rows_and_not_requests(server: Server, make_gate: Callable[[str], Path]) -> None:
    with hold_model(server, make_gate) as submit:
        three_rows, two_rows, one_row = submit("a", "b", "c"), submit("d", "e"), submit("f")

    assert (three_rows.result(), one_row.result()) == ([4] * 3, [4])  # the last request fills the first batch
    assert two_rows.result() == [2, 2]


def test_a_request_larger_than_max_batch_size_takes_several_runs(server: Server) -> None:
    assert send_rows(server, *"abcdefghij") == [4] * 8 + [2] * 2


def test_rows_of_different_datatypes_do_not_run_together(server: Server, make_gate: Callable[[str], Path]) -> None:
    with hold_model(server, make_gate) as submit:
        text, integer, more_text, fraction = submit("a"), submit(1), submit("b"), submit(1.5)

    assert (text.result(), more_text.result()) == ([2], [2])
    assert (integer.result(), fraction.result()) == ([1], [1])


def test_a_failing_request_does_not_fail_the_others_of_its_batch(
    server: Server, make_gate: Callable[[str], Path]
) -> None:
    with hold_model(server, make_gate) as submit:
        answers = [submit(name) for name in ("a", "fail", "c")]

    assert [answer.result() for answer in answers] == [[1], 500, [1]]
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="alone") == 3


def test_a_queued_request_is_not_run_after_its_client_cancels(
    server: Server, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel, hold_model(server, make_gate) as submit:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        leaving = call.future(make_image_request(google, b"x").SerializeToString(), timeout=60)
        wait_for_metric(server, "pinnace_requests_queued_or_running", 2)
        leaving.cancel()
        wait_for(lambda: requests_by_outcome(server).get(("grpc", "cancelled")) == 1, "a cancelled call")
        stays = submit("a")  # the cancelled request is no longer counted

    assert stays.result() == [1]
    assert metric_value(server, "pinnace_dropped_requests_total", model_name=MODEL) == 1
    assert metric_value(server, "pinnace_batch_rows_sum", model_name=MODEL) == 2


def test_a_batch_waits_for_more_rows_up_to_max_batch_delay_ms(make_gate: Callable[[str], Path]) -> None:
    with (
        run_server(BATCH_SIZE, "--max_batch_size=3", "--max_batch_delay_ms=60000") as server,
        ThreadPoolExecutor() as clients,
    ):
        assert list(clients.map(lambda name: send_rows(server, name), "abc")) == [[3]] * 3

    with run_server(BATCH_SIZE, "--max_batch_size=3", "--max_batch_delay_ms=10") as server:
        assert send_rows(server, "a") == [1]
        assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="delay") == 1


def test_nothing_is_decoded_during_a_run_that_uses_all_cores(make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    with run_server(ALL_CORES) as server, ThreadPoolExecutor() as clients:
        first = clients.submit(send_rows, server, str(held))
        with held.open("wb"):
            later = [clients.submit(send_rows, server, name) for name in "abc"]
            wait_for_metric(server, "pinnace_requests_in_flight", 4)
            for _ in range(20):
                assert metric_value(server, "pinnace_requests_queued_or_running") == 1
        assert [answer.result() for answer in (first, *later)] == [[1], [3], [3], [3]]


def test_a_run_that_uses_all_cores_waits_for_requests_being_decoded(make_gate: Callable[[str], Path]) -> None:
    held, decoding = make_gate("held"), make_gate("decoding")
    with run_server(ALL_CORES) as server, ThreadPoolExecutor() as clients:
        first = clients.submit(send_rows, server, str(held))
        with held.open("wb"):
            for _ in range(100):  # a long run: the time to wait for requests being decoded is relative to it
                server.get("/metrics")
        assert first.result() == [1]
        slow = clients.submit(send_rows, server, f"@{decoding}")
        with decoding.open("wb"):
            quick = clients.submit(send_rows, server, "a")
            wait_for_metric(server, "pinnace_requests_queued_or_running", 1)
        assert (slow.result(), quick.result()) == ([2], [2])


def test_a_run_that_uses_all_cores_does_not_wait_long_for_requests_being_decoded(
    make_gate: Callable[[str], Path],
) -> None:
    decoding = make_gate("decoding")
    with run_server(ALL_CORES) as server, ThreadPoolExecutor() as clients:
        assert send_rows(server, "a") == [1]  # a very short run: waiting for requests being decoded would take longer
        slow = clients.submit(send_rows, server, f"@{decoding}")
        with decoding.open("wb"):
            assert send_rows(server, "b") == [1]
        assert slow.result() == [1]


def test_rows_that_are_lists_are_batched_as_arrays_are(make_gate: Callable[[str], Path]) -> None:
    with run_server("--predictor=tests.support.predictors:ListRows") as server, hold_model(server, make_gate) as submit:
        answers = [submit(number) for number in range(3)]

    assert [answer.result() for answer in answers] == [[3]] * 3


@pytest.mark.parametrize(
    ("predictor", "problem"),
    [
        ("LosesRow", "predict received 2 rows and returned 1 of rows"),
        (
            "LosesAllRows",
            "preprocess must return arrays that have the same number of rows, at least 1; it returned [0]",
        ),
    ],
)
def test_a_predictor_that_loses_rows_is_detected(predictor: str, problem: str) -> None:
    with run_server(f"--predictor=tests.support.predictors:{predictor}") as server:
        assert send_rows(server, 1, 2) == 500
        server.stop()

    assert any(problem in line for line in server.log)


def test_sys_exit_in_a_handler_fails_only_its_own_request() -> None:
    with run_server("--predictor=tests.support.predictors:Exiting", "--max_asyncio_workers=2") as server:
        assert [send_rows(server, handler) for handler in ("preprocess", "predict", "postprocess") * 3] == [500] * 9
        assert send_rows(server, "nowhere") == ["nowhere"]


async def test_a_cancelled_requests_body_is_freed_while_the_model_is_busy() -> None:
    threads, free = Scheduler(decoders=1), threading.Event()
    batcher = Batcher(MODEL, threads, Metrics(), max_batch_size=1, max_batch_delay_ms=0)

    def decode(body: Body) -> PreprocessedRequest:
        free.wait()
        raise InvalidInput("that was long enough")

    async def submit(body: Body) -> None:
        await batcher.submit(Steps(partial(decode, body), lambda *_: None), RequestTimings())

    def start_request() -> tuple[asyncio.Task[None], weakref.ref[Body]]:
        body = Body()
        return asyncio.create_task(submit(body)), weakref.ref(body)

    ahead = [asyncio.create_task(submit(Body())) for _ in range(PIPELINE_DEPTH)]
    behind, body = start_request()
    await asyncio.sleep(0)  # one iteration of the event loop, in which all tasks submit
    behind.cancel()
    await asyncio.wait({behind})
    del behind
    gc.collect()
    assert body() is None

    free.set()
    assert all(isinstance(outcome, InvalidInput) for outcome in await asyncio.gather(*ahead, return_exceptions=True))
    threads.close()


class Body:
    """An object that supports weak references."""
