"""The batcher alone: the requests that share a run, errors, and cancellation."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike

from pinnace.errors import InternalError, InvalidInput, TooLarge
from pinnace.inference.batch import PreprocessedRequest
from pinnace.inference.batching import PIPELINE_DEPTH, Batcher
from pinnace.inference.scheduler import UNLIMITED, Scheduler
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import RequestTimings
from pinnace.predictor import Arrays, PreprocessCost
from tests.support.waiting import wait_for
from tests.unit.inference import FREE, MODEL, TIMEOUT_SECONDS, AllCores, Recorder, Steps, preprocessed, sample


class Bench:
    """A batcher with a scheduler and metrics of its own, and a way to submit rows to it."""

    def __init__(
        self, predictor: Recorder, decoders: int, max_batch_size: int, max_batch_delay_ms: int, max_decode_bytes: int
    ) -> None:
        self.predictor = predictor
        self.metrics = Metrics()
        self.scheduler = Scheduler(decoders, max_decode_bytes)
        self.batcher = Batcher(MODEL, self.scheduler, self.metrics, max_batch_size, max_batch_delay_ms)

    async def submit(self, *rows: float, dtype: DTypeLike = np.float32, timings: RequestTimings | None = None) -> Any:
        """Submit a request of these rows and return the list of predictions for them."""
        return await self.submit_steps(
            lambda: preprocessed(self.predictor, rows, dtype),
            lambda _, predictions: predictions["y"].tolist(),
            timings,
        )

    async def submit_steps(
        self,
        preprocess: Callable[[], PreprocessedRequest],
        postprocess: Callable[[PreprocessedRequest, Arrays], Any],
        timings: RequestTimings | None = None,
        cost: PreprocessCost = FREE,
    ) -> Any:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self.batcher.submit(Steps(preprocess, postprocess, cost), timings or RequestTimings())

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Hold the model in a run of the row 0 for the body of an `async with` statement."""
        self.predictor.gate.clear()
        first = asyncio.create_task(self.submit(0))
        assert await asyncio.to_thread(self.predictor.has_started.wait, TIMEOUT_SECONDS)
        try:
            yield
        finally:
            self.predictor.gate.set()
        assert await first == [0]

    async def wait_until_queued(self, num_requests: int) -> None:
        """Return once so many requests are decoded, the one that runs included."""
        await asyncio.to_thread(
            wait_for,
            lambda: sample(self.metrics, "pinnace_requests_queued_or_running") == num_requests,
            f"{num_requests} decoded requests",
        )


@asynccontextmanager
async def running(
    predictor: Recorder | None = None,
    decoders: int = 1,
    max_batch_size: int = 4,
    max_batch_delay_ms: int = 0,
    max_decode_bytes: int = UNLIMITED,
) -> AsyncIterator[Bench]:
    """Yield a bench whose worker threads end afterwards."""
    bench = Bench(predictor or Recorder(), decoders, max_batch_size, max_batch_delay_ms, max_decode_bytes)
    try:
        yield bench
    finally:
        bench.scheduler.close()


async def test_a_request_to_an_idle_model_runs_alone_and_at_once() -> None:
    async with running() as bench:
        assert await bench.submit(1, 2) == [1, 2]

        assert bench.predictor.runs == [[1, 2]]
        assert sample(bench.metrics, "pinnace_batches_total", model_name=MODEL, reason="idle") == 1


async def test_requests_that_arrive_during_a_run_share_the_next_one_and_each_gets_its_own_rows() -> None:
    async with running() as bench:
        async with bench.busy():
            waiting = [asyncio.create_task(bench.submit(*rows)) for rows in ((1, 2), (3,), (4,))]
            await bench.wait_until_queued(4)

        assert await asyncio.gather(*waiting) == [[1, 2], [3], [4]]
        assert bench.predictor.runs == [[0], [1, 2, 3, 4]]


async def test_a_run_has_at_most_max_batch_size_rows() -> None:
    async with running(max_batch_size=2) as bench:
        async with bench.busy():
            waiting = [asyncio.create_task(bench.submit(row)) for row in (1, 2, 3)]
            await bench.wait_until_queued(4)
        await asyncio.gather(*waiting)

        assert [len(rows) for rows in bench.predictor.runs] == [1, 2, 1]
        assert sample(bench.metrics, "pinnace_batches_total", model_name=MODEL, reason="full") == 1


async def test_a_request_with_more_rows_than_a_batch_runs_in_chunks() -> None:
    async with running(max_batch_size=2) as bench:
        assert await bench.submit(1, 2, 3, 4, 5) == [1, 2, 3, 4, 5]

        assert bench.predictor.runs == [[1, 2], [3, 4], [5]]


async def test_requests_with_different_dtypes_do_not_share_a_run() -> None:
    async with running() as bench:
        async with bench.busy():
            waiting = [
                asyncio.create_task(bench.submit(1, dtype=dtype)) for dtype in (np.float32, np.int64, np.float32)
            ]
            await bench.wait_until_queued(4)
        await asyncio.gather(*waiting)

        assert sorted(len(rows) for rows in bench.predictor.runs) == [1, 1, 2]


async def test_a_row_that_fails_a_batch_fails_its_own_request_only() -> None:
    async with running() as bench:
        async with bench.busy():
            waiting = [asyncio.create_task(bench.submit(row)) for row in (1, -1, 3)]
            await bench.wait_until_queued(4)
        first, faulty, last = await asyncio.gather(*waiting, return_exceptions=True)

        assert (first, last) == ([1], [3])
        assert isinstance(faulty, InternalError)
        assert sample(bench.metrics, "pinnace_batches_total", model_name=MODEL, reason="alone") == 3


async def test_an_error_of_preprocess_reaches_its_request() -> None:
    def refuse() -> PreprocessedRequest:
        raise InvalidInput("no such picture")

    async with running() as bench:
        with pytest.raises(InvalidInput, match="no such picture"):
            await bench.submit_steps(refuse, lambda _, __: None)
        assert await bench.submit(1) == [1]


async def test_an_unexpected_error_of_postprocess_becomes_an_internal_error() -> None:
    def fail(_: PreprocessedRequest, __: Arrays) -> None:
        raise KeyError("secret")

    async with running() as bench:
        with pytest.raises(InternalError, match=r"^Internal server error$"):
            await bench.submit_steps(lambda: preprocessed(bench.predictor, [1]), fail)


async def test_a_cancelled_request_is_not_run_and_is_counted_as_dropped() -> None:
    async with running() as bench:
        async with bench.busy():
            leaving = asyncio.create_task(bench.submit(1))
            staying = asyncio.create_task(bench.submit(2))
            await bench.wait_until_queued(3)
            leaving.cancel()
            await asyncio.wait({leaving})
        assert await staying == [2]

        assert bench.predictor.runs == [[0], [2]]
        assert sample(bench.metrics, "pinnace_dropped_requests_total", model_name=MODEL) == 1
        assert sample(bench.metrics, "pinnace_requests_queued_or_running") == 0


async def test_a_run_that_outlives_its_request_is_observed() -> None:
    timings = RequestTimings()
    async with running() as bench:
        bench.predictor.gate.clear()
        leaving = asyncio.create_task(bench.submit(1, timings=timings))
        assert await asyncio.to_thread(bench.predictor.has_started.wait, TIMEOUT_SECONDS)
        leaving.cancel()
        await asyncio.wait({leaving})
        bench.metrics.observe_request("v1", "cancelled", timings, 0, 0)
        assert sample(bench.metrics, "pinnace_stage_seconds_count", stage="infer") == 0
        bench.predictor.gate.set()
        assert await bench.submit(2) == [2]

    assert sample(bench.metrics, "pinnace_stage_seconds_count", stage="infer") == 1
    assert sample(bench.metrics, "request_predict_seconds_count", model_name=MODEL) == 1


async def test_an_error_keeps_nothing_of_its_request_in_memory() -> None:
    class Body:
        """An object to which a weak reference can be made."""

    def refuse(_: Body) -> PreprocessedRequest:
        raise InvalidInput("damaged")

    async def submit(bench: Bench) -> weakref.ref[Body]:
        body = Body()
        with pytest.raises(InvalidInput):
            await bench.batcher.submit(Steps(partial(refuse, body), lambda *_: None), RequestTimings())
        return weakref.ref(body)

    gc.disable()
    try:
        async with running() as bench:
            body = await submit(bench)
            await bench.submit(1)  # the worker has gone on to another request
            assert body() is None
    finally:
        gc.enable()


async def test_a_cancelled_request_in_the_backlog_is_never_decoded() -> None:
    decoded: list[str] = []

    def decode() -> PreprocessedRequest:
        decoded.append("decoded")
        return preprocessed(bench.predictor, [9])

    async with running(max_batch_size=1) as bench:
        async with bench.busy():
            ahead = [asyncio.create_task(bench.submit(row)) for row in range(1, PIPELINE_DEPTH)]
            await bench.wait_until_queued(PIPELINE_DEPTH)
            leaving = asyncio.create_task(bench.submit_steps(decode, lambda _, __: None))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait({leaving})
        await asyncio.gather(*ahead)

        assert decoded == []


async def test_a_batch_waits_up_to_the_delay_to_be_filled() -> None:
    async with running(max_batch_size=3, max_batch_delay_ms=60_000) as bench:
        assert await asyncio.gather(*(bench.submit(row) for row in (1, 2, 3))) == [[1], [2], [3]]
        assert [sorted(rows) for rows in bench.predictor.runs] == [[1, 2, 3]]

    async with running(max_batch_size=3, max_batch_delay_ms=1) as bench:
        assert await bench.submit(1) == [1]
        assert sample(bench.metrics, "pinnace_batches_total", model_name=MODEL, reason="delay") == 1


async def test_a_run_that_uses_all_cores_waits_for_a_request_being_decoded() -> None:
    is_decoding, may_decode = threading.Event(), threading.Event()

    def decode_slowly() -> PreprocessedRequest:
        is_decoding.set()
        may_decode.wait(TIMEOUT_SECONDS)
        return preprocessed(bench.predictor, [1])

    async with running(AllCores(), decoders=2) as bench:
        bench.batcher._run_seconds = (
            TIMEOUT_SECONDS  # the last run took so long that it is worth waiting for the decoder
        )
        slow = asyncio.create_task(bench.submit_steps(decode_slowly, lambda _, predictions: predictions["y"].tolist()))
        await asyncio.to_thread(is_decoding.wait, TIMEOUT_SECONDS)
        quick = asyncio.create_task(bench.submit(2))
        await bench.wait_until_queued(1)
        assert bench.predictor.runs == []
        may_decode.set()
        slow_result, quick_result = await asyncio.gather(slow, quick)
        assert (slow_result, quick_result) == ([1], [2])

        assert [sorted(rows) for rows in bench.predictor.runs] == [[1, 2]]


async def test_the_stages_of_a_request_are_recorded_in_its_timings() -> None:
    timings = RequestTimings()
    async with running() as bench:
        await bench.submit(1, timings=timings)

    assert timings.stages.keys() == {"decode_queue", "decode", "queue", "infer", "encode"}
    assert all(seconds >= 0 for seconds in timings.stages.values())
    assert timings.handlers["predict"] == timings.stages["infer"]


class Held:
    """A `preprocess` that waits until the test lets it go on."""

    def __init__(self, bench: Bench, row: float) -> None:
        self._bench, self._row = bench, row
        self.has_started, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> PreprocessedRequest:
        self.has_started.set()
        assert self.may_end.wait(TIMEOUT_SECONDS)
        return preprocessed(self._bench.predictor, [self._row])

    async def wait_until_started(self) -> None:
        assert await asyncio.to_thread(self.has_started.wait, TIMEOUT_SECONDS)


def submit_held(bench: Bench, held: Held, cost: PreprocessCost) -> asyncio.Task[Any]:
    return asyncio.create_task(bench.submit_steps(held, lambda _, predictions: predictions["y"].tolist(), cost=cost))


async def test_a_request_waits_for_its_memory_without_a_thread_and_others_go_on() -> None:
    large = PreprocessCost(memory_bytes=600)
    async with running(decoders=2, max_decode_bytes=1000) as bench:
        first, second = Held(bench, 1), Held(bench, 2)
        first_result = submit_held(bench, first, large)
        await first.wait_until_started()
        second_result = submit_held(bench, second, large)
        assert await bench.submit(3) == [3]  # with the other thread, which the second request does not take
        assert not second.has_started.is_set()
        first.may_end.set()
        assert await first_result == [1]
        second.may_end.set()

        assert await second_result == [2]


async def test_a_batch_does_not_wait_for_a_slow_request() -> None:
    async with running(AllCores(), decoders=2) as bench:
        bench.batcher._run_seconds = TIMEOUT_SECONDS  # so long would a batch wait for another request
        slow = Held(bench, 1)
        slow_result = submit_held(bench, slow, PreprocessCost(cpu_seconds=10))
        await slow.wait_until_started()

        assert await bench.submit(2) == [2]
        slow.may_end.set()
        assert await slow_result == [1]


@pytest.mark.parametrize("is_waiting", [True, False])
async def test_a_cancelled_request_gives_its_share_back(is_waiting: bool) -> None:
    large = PreprocessCost(memory_bytes=600)
    async with running(decoders=2, max_decode_bytes=1000) as bench:
        first, second, third = Held(bench, 1), Held(bench, 2), Held(bench, 3)
        results = [submit_held(bench, first, large)]
        await first.wait_until_started()
        results += [submit_held(bench, held, large) for held in (second, third)]
        await bench.submit(0)  # all three have requested their shares
        leaving = results.pop(1 if is_waiting else 0)
        leaving.cancel()
        await asyncio.wait({leaving})
        for held in (first, second, third):
            held.may_end.set()

        assert sorted(await asyncio.gather(*results)) == ([[1], [3]] if is_waiting else [[2], [3]])


async def test_a_request_that_can_never_have_its_memory_is_refused() -> None:
    async with running(max_decode_bytes=1000) as bench:
        with pytest.raises(TooLarge):
            await submit_held(bench, Held(bench, 1), PreprocessCost(memory_bytes=1001))
        assert await bench.submit(2) == [2]


async def test_preprocess_is_told_when_nobody_waits_any_more() -> None:
    class Asking(Steps):
        def preprocess(self, is_abandoned: Callable[[], bool]) -> PreprocessedRequest:
            has_started.set()
            wait_for(is_abandoned, "the request to be abandoned")
            has_seen.set()
            return self._preprocess()

    has_started, has_seen = threading.Event(), threading.Event()
    async with running() as bench:
        steps = Asking(lambda: preprocessed(bench.predictor, [1]), lambda *_: None)
        leaving = asyncio.create_task(bench.batcher.submit(steps, RequestTimings()))
        assert await asyncio.to_thread(has_started.wait, TIMEOUT_SECONDS)
        leaving.cancel()
        await asyncio.wait({leaving})

        assert await asyncio.to_thread(has_seen.wait, TIMEOUT_SECONDS)


async def test_the_scheduler_tells_for_how_long_every_decoder_or_a_run_has_been_busy() -> None:
    async with running(decoders=1) as bench:
        assert bench.scheduler.stuck_seconds == 0
        async with bench.busy():
            assert bench.scheduler.stuck_seconds > 0
        held = Held(bench, 1)
        result = submit_held(bench, held, FREE)
        await held.wait_until_started()
        assert bench.scheduler.stuck_seconds > 0
        held.may_end.set()
        await result

        await asyncio.to_thread(wait_for, lambda: bench.scheduler.stuck_seconds == 0, "the scheduler to be free")
