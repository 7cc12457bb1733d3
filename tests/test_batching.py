"""pinnace/batching.py: which rows run together, and whom that concerns."""

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
from pinnace.inference.batch import Prepared
from pinnace.inference.batching import PIPELINE_DEPTH, Batcher
from pinnace.inference.scheduler import Scheduler
from pinnace.observability.metrics import Metrics
from tests.support.clients import make_image_request
from tests.support.metrics import metric_value, requests_by_outcome, wait_for_metric
from tests.support.servers import Server, run_server
from tests.support.waiting import wait_for

SIZES = "--predictor=tests.support.predictors:BatchSize"
EVERY_CORE = "--predictor=tests.support.predictors:AllCores"
MODEL = "custom-model"


@pytest.fixture
def server() -> Iterator[Server]:
    with run_server(SIZES, "--max_batch_size=4") as server:
        yield server


def sizes(server: Server, *instances: Any) -> Any:
    """How large the run was in which each instance of one request was."""
    response = server.predict(json.dumps({"instances": instances}))
    return response.json().get("predictions", response.status_code)


@contextmanager
def busy(server: Server, gate: Callable[[str], Path]) -> Iterator[Callable[..., Future[Any]]]:
    """The model is held in a run of one row; what is submitted meanwhile has reached the queue when this ends."""
    held = gate("held")
    with ThreadPoolExecutor(32) as clients:
        first = clients.submit(sizes, server, str(held))
        waiting = 1
        with held.open("wb"):

            def submit(*instances: Any) -> Future[Any]:
                nonlocal waiting
                answer = clients.submit(sizes, server, *instances)
                waiting += 1
                wait_for_metric(server, "pinnace_requests_queued_or_running", waiting)
                return answer

            yield submit
        assert first.result() == [1]


def test_a_lone_request_runs_at_once_and_alone(server: Server) -> None:
    assert sizes(server, "a") == [1]
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="idle") == 1


def test_what_arrives_during_a_run_goes_together_in_the_next(server: Server, gate: Callable[[str], Path]) -> None:
    with busy(server, gate) as submit:
        answers = [submit(name) for name in "abc"]

    assert [answer.result() for answer in answers] == [[3]] * 3
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="queued") == 1
    assert metric_value(server, "pinnace_batch_rows_sum", model_name=MODEL) == 4


def test_no_run_has_more_rows_than_allowed(server: Server, gate: Callable[[str], Path]) -> None:
    with busy(server, gate) as submit:
        answers = [submit(name) for name in "abcdef"]

    assert [answer.result() for answer in answers] == [[4]] * 4 + [[2]] * 2
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="full") == 1


def test_rows_are_counted_and_not_requests(server: Server, gate: Callable[[str], Path]) -> None:
    with busy(server, gate) as submit:
        three, two, one = submit("a", "b", "c"), submit("d", "e"), submit("f")

    assert (three.result(), one.result()) == ([4] * 3, [4])  # the one goes where it fits
    assert two.result() == [2, 2]


def test_a_request_larger_than_a_batch_takes_several_runs(server: Server) -> None:
    assert sizes(server, *"abcdefghij") == [4] * 8 + [2] * 2


def test_rows_of_different_kinds_do_not_run_together(server: Server, gate: Callable[[str], Path]) -> None:
    with busy(server, gate) as submit:
        text, whole, more_text, broken = submit("a"), submit(1), submit("b"), submit(1.5)

    assert (text.result(), more_text.result()) == ([2], [2])
    assert (whole.result(), broken.result()) == ([1], [1])


def test_a_row_that_fails_fails_nobody_else(server: Server, gate: Callable[[str], Path]) -> None:
    with busy(server, gate) as submit:
        answers = [submit(name) for name in ("a", "fail", "c")]

    assert [answer.result() for answer in answers] == [[1], 500, [1]]
    assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="alone") == 3


def test_a_request_whose_client_left_while_it_waited_is_not_run(
    server: Server, gate: Callable[[str], Path], google: ModuleType
) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel, busy(server, gate) as submit:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        leaving = call.future(make_image_request(google, b"x").SerializeToString(), timeout=60)
        wait_for_metric(server, "pinnace_requests_queued_or_running", 2)
        leaving.cancel()
        wait_for(lambda: requests_by_outcome(server).get(("grpc", "cancelled")) == 1, "a cancelled call")
        stays = submit("a")  # the one that left is not counted at the model any more

    assert stays.result() == [1]
    assert metric_value(server, "pinnace_dropped_requests_total", model_name=MODEL) == 1
    assert metric_value(server, "pinnace_batch_rows_sum", model_name=MODEL) == 2


def test_a_batch_waits_to_be_filled_where_that_is_wished(gate: Callable[[str], Path]) -> None:
    with (
        run_server(SIZES, "--max_batch_size=3", "--max_batch_delay_ms=60000") as server,
        ThreadPoolExecutor() as clients,
    ):
        assert list(clients.map(lambda name: sizes(server, name), "abc")) == [[3]] * 3

    with run_server(SIZES, "--max_batch_size=3", "--max_batch_delay_ms=10") as server:
        assert sizes(server, "a") == [1]
        assert metric_value(server, "pinnace_batches_total", model_name=MODEL, reason="delay") == 1


def test_nothing_is_decoded_during_a_run_that_takes_every_core(gate: Callable[[str], Path]) -> None:
    held = gate("held")
    with run_server(EVERY_CORE) as server, ThreadPoolExecutor() as clients:
        first = clients.submit(sizes, server, str(held))
        with held.open("wb"):
            later = [clients.submit(sizes, server, name) for name in "abc"]
            wait_for_metric(server, "pinnace_requests_in_flight", 4)
            for _ in range(20):
                assert metric_value(server, "pinnace_stage_seconds_count", stage="decode") == 1
        assert [answer.result() for answer in (first, *later)] == [[1], [3], [3], [3]]


def test_a_run_that_takes_every_core_waits_for_those_being_decoded(gate: Callable[[str], Path]) -> None:
    held, decoding = gate("held"), gate("decoding")
    with run_server(EVERY_CORE) as server, ThreadPoolExecutor() as clients:
        first = clients.submit(sizes, server, str(held))
        with held.open("wb"):
            for _ in range(100):  # a run of some length: what one may wait for those being decoded goes by it
                server.get("/metrics")
        assert first.result() == [1]
        slow = clients.submit(sizes, server, f"@{decoding}")
        with decoding.open("wb"):
            quick = clients.submit(sizes, server, "a")
            wait_for_metric(server, "pinnace_requests_queued_or_running", 1)
        assert (slow.result(), quick.result()) == ([2], [2])


def test_a_run_that_takes_every_core_does_not_wait_long_for_those_being_decoded(gate: Callable[[str], Path]) -> None:
    decoding = gate("decoding")
    with run_server(EVERY_CORE) as server, ThreadPoolExecutor() as clients:
        assert sizes(server, "a") == [1]  # in no time, so nothing is worth waiting for
        slow = clients.submit(sizes, server, f"@{decoding}")
        with decoding.open("wb"):
            assert sizes(server, "b") == [1]
        assert slow.result() == [1]


def test_rows_that_are_lists_run_together_as_arrays_do(gate: Callable[[str], Path]) -> None:
    with run_server("--predictor=tests.support.predictors:ListRows") as server, busy(server, gate) as submit:
        answers = [submit(number) for number in range(3)]

    assert [answer.result() for answer in answers] == [[3]] * 3


@pytest.mark.parametrize(
    ("predictor", "problem"),
    [
        ("LosesRow", "predict was given 2 rows and gave 1 of rows"),
        ("LosesAllRows", "preprocess must give arrays with as many rows in each, one at least, and gave {0}"),
    ],
)
def test_a_predictor_that_loses_rows_is_found_out(predictor: str, problem: str) -> None:
    with run_server(f"--predictor=tests.support.predictors:{predictor}") as server:
        assert sizes(server, 1, 2) == 500
        server.stop()

    assert any(problem in line for line in server.log)


def test_a_predictor_that_wants_to_end_the_process_fails_its_request_alone() -> None:
    with run_server("--predictor=tests.support.predictors:Exiting", "--max_asyncio_workers=2") as server:
        assert [sizes(server, where) for where in ("preprocess", "predict", "postprocess") * 3] == [500] * 9
        assert sizes(server, "nowhere") == ["nowhere"]


async def test_what_a_client_sent_is_forgotten_when_it_leaves_though_the_model_is_busy() -> None:
    threads, free = Scheduler(decoders=1), threading.Event()
    batcher = Batcher(MODEL, threads, Metrics(), max_batch_size=1, max_batch_delay_ms=0)

    def decode(body: Body) -> Prepared:
        free.wait()
        raise InvalidInput("that was long enough")

    async def ask(body: Body) -> None:
        await batcher.answered(partial(decode, body), lambda *_: None)

    def leaving() -> tuple[asyncio.Task[None], weakref.ref[Body]]:
        body = Body()
        return asyncio.create_task(ask(body)), weakref.ref(body)

    ahead = [asyncio.create_task(ask(Body())) for _ in range(PIPELINE_DEPTH)]
    behind, body = leaving()
    await asyncio.sleep(0)  # a turn, in which all have asked
    behind.cancel()
    await asyncio.wait({behind})
    del behind
    gc.collect()
    assert body() is None

    free.set()
    assert all(isinstance(end, InvalidInput) for end in await asyncio.gather(*ahead, return_exceptions=True))
    threads.close()


class Body:
    """What a weak reference can be had of."""
