"""The decode budget alone: who gets a share, who waits and in which order, and who is refused."""

from __future__ import annotations

import pytest

from pinnace.errors import Overloaded, TooLarge
from pinnace.inference.decode_budget import SLOW_SECONDS, DecodeBudget, Share
from pinnace.predictor import PreprocessCost
from pinnace.settings import MIB

MAX_BYTES = 80 * MIB  # of which 10 are kept for small requests, of up to 2.5 each


class Budget:
    """A budget, and the names of the requests whose shares were granted, in this order."""

    def __init__(self, num_decoders: int = 2, max_waiting: int = 100) -> None:
        self.budget = DecodeBudget(MAX_BYTES, num_decoders, max_waiting)
        self.granted: list[str] = []

    def request(self, name: str, mib: float, seconds: float = 0.0) -> Share:
        cost = PreprocessCost(int(mib * MIB), seconds)
        share = self.budget.request(cost, lambda: self.granted.append(name))
        if share.is_granted:
            self.granted.append(name)
        return share


def test_requests_get_shares_while_there_is_memory_and_wait_in_order_of_arrival() -> None:
    budget = Budget()
    first = budget.request("first", 60)
    budget.request("second", 20)
    third = budget.request("third", 40)
    assert budget.granted == ["first"]

    budget.budget.release(first)

    assert budget.granted == ["first", "second", "third"]
    budget.budget.release(third)
    assert budget.request("fourth", 50).is_granted


def test_a_request_that_waits_for_memory_is_not_overtaken_by_a_smaller_one_of_its_kind() -> None:
    budget = Budget()
    budget.request("running", 40)
    budget.request("waiting", 60)

    assert not budget.request("smaller", 5).is_granted


def test_small_requests_have_memory_of_their_own() -> None:
    budget = Budget()
    budget.request("large", 70)
    budget.request("waiting", 70)

    assert [budget.request("small", 2.5).is_granted for _ in range(5)] == [True] * 4 + [False]


def test_a_request_that_costs_nothing_never_waits() -> None:
    budget = Budget()
    for _ in range(4):
        budget.request("small", 2.5)

    assert budget.request("free", 0).is_granted


def test_slow_requests_leave_one_thread_to_the_others() -> None:
    budget = Budget(num_decoders=3)
    slow = [budget.request(f"slow {number}", 3, SLOW_SECONDS * 2) for number in range(3)]
    assert [share.is_granted for share in slow] == [True, True, False]

    assert budget.request("quick", 3, SLOW_SECONDS / 2).is_granted


def test_a_slow_request_makes_way_when_it_is_decoded_and_keeps_the_memory_of_its_arrays() -> None:
    budget = Budget()
    slow = budget.request("slow", 60, 1.0)
    budget.request("next", 60, 1.0)

    budget.budget.finish_decoding(slow, 30 * MIB)
    assert budget.granted == ["slow"]
    budget.budget.release(slow)

    assert budget.granted == ["slow", "next"]


def test_arrays_never_count_for_more_than_was_estimated() -> None:
    budget = Budget()
    for _ in range(10):
        budget.budget.finish_decoding(budget.request("free", 0), 50 * MIB)

    assert budget.request("large", 70).is_granted
    assert budget.request("small", 2).is_granted


def test_a_share_is_given_back_once_however_often_it_is_released() -> None:
    budget = Budget()
    share = budget.request("large", 70)
    for _ in range(3):
        budget.budget.release(share)

    assert budget.request("large", 70).is_granted
    assert not budget.request("another", 70).is_granted


def test_a_request_that_leaves_while_it_waits_makes_way() -> None:
    budget = Budget()
    budget.request("running", 40)
    leaving = budget.request("leaving", 60)
    budget.request("behind", 20)

    budget.budget.release(leaving)

    assert budget.granted == ["running", "behind"]


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(TooLarge, match=r"takes 71 MiB of memory to be decoded, more than the 70 MiB that max_decode_"):
        Budget().request("huge", 71)


def test_only_so_many_large_requests_may_wait() -> None:
    budget = Budget(max_waiting=1)
    budget.request("running", 70)
    budget.request("waiting", 70)

    with pytest.raises(Overloaded, match="large requests that wait to be decoded"):
        budget.request("one too many", 70)
    assert budget.request("small", 2).is_granted
