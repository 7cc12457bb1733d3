"""The scheduler alone: the order of jobs, how many run at once, and how workers wake and end."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator

import pytest

from pinnace.errors import InternalError, InvalidInput
from pinnace.inference.scheduler import Job, Scheduler
from tests.unit.inference import TIMEOUT_SECONDS


class Runs:
    """A source of one run, at a given time."""

    def __init__(self, ready_at: float, job: Job, uses_all_cores: bool = False) -> None:
        self.ready_at = ready_at
        self.uses_all_cores = uses_all_cores
        self.running_since = math.inf
        self._job = job

    def next_job(self) -> Job:
        self.ready_at = math.inf
        return self._job


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(decoders=2)
    yield scheduler
    scheduler.close()


async def test_work_returns_its_result(scheduler: Scheduler) -> None:
    assert await scheduler.submit_decode(lambda: 1 + 1) == 2
    assert await scheduler.submit_encode(lambda: "text") == "text"


async def test_a_serving_error_of_work_is_raised_as_it_is(scheduler: Scheduler) -> None:
    def refuse() -> None:
        raise InvalidInput("not a picture")

    with pytest.raises(InvalidInput, match="not a picture"):
        await scheduler.submit_decode(refuse)


@pytest.mark.parametrize("error", [KeyError("secret"), SystemExit(1)])
async def test_any_other_exception_of_work_becomes_an_internal_error(
    scheduler: Scheduler, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(InternalError, match=r"^Internal server error$"):
        await scheduler.submit_decode(fail)
    assert await scheduler.submit_decode(lambda: "the worker goes on") == "the worker goes on"


async def test_no_more_requests_are_decoded_at_once_than_there_are_decoders(scheduler: Scheduler) -> None:
    lock, running, most = threading.Lock(), 0, 0
    gate = threading.Barrier(2)

    def decode() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(TIMEOUT_SECONDS)  # passes only if two decode at once
        with lock:
            running -= 1

    await asyncio.gather(*(scheduler.submit_decode(decode) for _ in range(6)))

    assert most == 2


async def test_nothing_is_decoded_while_a_run_uses_all_cores(scheduler: Scheduler) -> None:
    order: list[str] = []
    with scheduler.lock:
        scheduler.has_exclusive_run = True
    decoding = asyncio.create_task(scheduler.submit_decode(lambda: order.append("decode")))
    await asyncio.sleep(0)
    await scheduler.submit_encode(lambda: order.append("encode"))
    with scheduler.lock:
        scheduler.has_exclusive_run = False
        scheduler.wake_worker()
    await decoding

    assert order == ["encode", "decode"]


def test_a_ready_run_comes_before_decoding_and_after_encoding(scheduler: Scheduler) -> None:
    scheduler.close()  # no worker takes the jobs
    model = Runs(0.0, lambda: None)
    with scheduler.lock:
        scheduler._models.append(model)
        scheduler.decode_queue.append(lambda: None)
        scheduler.encode_queue.append(lambda: None)
        sources = []
        for _ in range(3):
            _, source = scheduler._next_source(time.perf_counter())
            assert source
            source.next_job()
            sources.append(source)

    assert sources == [scheduler.encode_queue, model, scheduler.decode_queue]


def test_the_run_that_was_ready_first_comes_first_and_none_while_it_would_need_the_cores_of_another(
    scheduler: Scheduler,
) -> None:
    scheduler.close()
    early, late = Runs(1.0, lambda: None, uses_all_cores=True), Runs(2.0, lambda: None)
    with scheduler.lock:
        scheduler._models += [late, early]
        assert scheduler._next_source(time.perf_counter()) == (1.0, early)
        scheduler.has_exclusive_run = True
        assert scheduler._next_source(time.perf_counter()) == (2.0, late)


def test_a_run_that_is_due_later_is_started_then(scheduler: Scheduler) -> None:
    started = threading.Event()
    due_at = time.perf_counter() + 0.05
    scheduler.add_source(Runs(due_at, started.set))
    with scheduler.lock:
        scheduler.wake_worker()

    assert started.wait(TIMEOUT_SECONDS)
    assert time.perf_counter() >= due_at


async def test_work_whose_caller_was_cancelled_is_skipped(scheduler: Scheduler) -> None:
    done: list[str] = []
    with scheduler.lock:
        scheduler.has_exclusive_run = True  # nothing is decoded for now
    leaving = asyncio.create_task(scheduler.submit_decode(lambda: done.append("leaving")))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait({leaving})
    with scheduler.lock:
        scheduler.has_exclusive_run = False
        scheduler.wake_worker()
    await scheduler.submit_decode(lambda: done.append("staying"))

    assert done == ["staying"]


def test_workers_end_when_the_scheduler_is_closed() -> None:
    before = set(threading.enumerate())
    scheduler = Scheduler(decoders=3)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 4  # three that decode, and one more
    scheduler.close()

    for worker in workers:
        worker.join(TIMEOUT_SECONDS)
    assert not any(worker.is_alive() for worker in workers)
