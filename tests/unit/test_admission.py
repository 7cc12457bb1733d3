"""Admission alone: limits on requests, rows and bytes, and how long a refused client should wait."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from pinnace.errors import Overloaded
from pinnace.inference.admission import Admission, ByteBudget
from pinnace.settings import Settings


def test_as_many_permits_can_be_held_as_allowed_and_one_more_is_refused() -> None:
    admission = Admission(Settings(max_concurrent_requests=2))
    with admission.admit():
        with admission.admit():
            assert admission.in_flight == 2
            with pytest.raises(Overloaded, match="max_concurrent_requests"), admission.admit():
                pass
        admission.check()
    assert admission.in_flight == 0


def test_the_rows_of_all_permits_are_limited_and_a_request_counts_as_one_until_it_is_decoded() -> None:
    admission = Admission(Settings(max_queue_rows=3))
    with admission.admit() as permit:
        admission.check()
        permit.num_rows = 3
        with pytest.raises(Overloaded, match="max_queue_rows"):
            admission.check()
        permit.num_rows = 2
        admission.check()


def test_a_permit_is_released_if_its_request_fails() -> None:
    admission = Admission(Settings(max_concurrent_requests=1))
    with pytest.raises(KeyError), admission.admit():
        raise KeyError
    admission.check()


def test_retry_after_is_a_second_before_any_request_is_completed() -> None:
    admission = Admission(Settings(max_concurrent_requests=1))
    with admission.admit(), pytest.raises(Overloaded) as refusal:
        admission.check()

    assert refusal.value.retry_after_seconds == 1.0


def test_retry_after_is_the_time_that_the_requests_in_flight_take_at_the_rate_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    admission = Admission(Settings(max_concurrent_requests=4))
    for _ in range(2):  # two requests of three seconds, one after the other, an hour apart
        with admission.admit():
            now += 3.0
        now += 3600.0
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(admission.admit())
        with pytest.raises(Overloaded) as refusal:
            admission.check()

    assert refusal.value.retry_after_seconds == pytest.approx(4 * 3.0)


def test_retry_after_is_never_longer_than_a_request_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    admission = Admission(Settings(max_concurrent_requests=1, request_timeout_seconds=5))
    with admission.admit():
        now += 50.0
    with admission.admit(), pytest.raises(Overloaded) as refusal:
        admission.check()

    assert refusal.value.retry_after_seconds == 5


def test_bytes_are_reserved_up_to_the_budget_and_released() -> None:
    budget = ByteBudget(10)
    budget.acquire(6)
    with pytest.raises(Overloaded, match="max_queue_bytes"):
        budget.acquire(5)
    budget.acquire(4)
    budget.release(6)
    with budget.reserve(6), pytest.raises(Overloaded), budget.reserve(1):
        pass
    budget.acquire(6)
