"""The decode budget: it limits the memory and the worker threads that decoding uses.

An image of 2 kB can take 750 MiB and a second of CPU. A request therefore gets a share of the budget before it is
decoded, or waits for one, without a thread, in order of arrival. An eighth of the memory is kept for small requests and
one thread for quick ones: while large images are decoded, small ones get their turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pinnace.errors import Overloaded, TooLarge
from pinnace.predictor import PreprocessCost
from pinnace.settings import MIB

SMALL_PART = 8  # one eighth of the budget is kept for small requests
SMALL_SHARES = 4  # a small request takes at most a quarter of that
SLOW_SECONDS = 0.25  # a JPEG of 17 megapixels


@dataclass(eq=False, slots=True)
class Share:
    """The part of the budget that one request has, or waits for."""

    num_bytes: int
    is_small: bool
    is_slow: bool
    """Whether it counts as a slow request: while it waits for its turn, and while it is decoded."""
    start: Callable[[], None]
    """Called when the share is granted after a wait."""
    is_granted: bool = False


class DecodeBudget:
    """The budget of one process, for all its models. Used only while the scheduler's lock is held."""

    def __init__(self, max_bytes: int, num_decoders: int, max_waiting: int) -> None:
        """Create the budget.

        Args:
            max_bytes: The setting max_decode_bytes, or one worker's part of it.
            num_decoders: The number of threads that decode. All but one of them, but at least one, decode requests
                that take long.
            max_waiting: The number of large or slow requests that may wait; further ones are refused.
        """
        self._max_small_bytes = max_bytes // SMALL_PART
        self._max_large_bytes = max_bytes - self._max_small_bytes
        self._max_slow = max(1, num_decoders - 1)
        self._max_waiting = max_waiting
        self._small_bytes = self._large_bytes = self._num_slow = 0
        self._waiting_small: deque[Share] = deque()
        self._waiting: deque[Share] = deque()  # large or slow

    def request(self, cost: PreprocessCost, start: Callable[[], None]) -> Share:
        """Return a share, which is granted, or waits: `start` is called when it is granted later.

        Raises:
            TooLarge: The request takes more memory than there is for any.
            Overloaded: Too many requests wait.
        """
        if cost.memory_bytes > self._max_large_bytes:
            raise TooLarge(
                f"the request takes {cost.memory_bytes / MIB:.0f} MiB of memory to be decoded, more than the "
                f"{self._max_large_bytes / MIB:.0f} MiB that max_decode_bytes allows"
            )
        is_small = cost.memory_bytes * SMALL_SHARES <= self._max_small_bytes
        share = Share(cost.memory_bytes, is_small, cost.cpu_seconds > SLOW_SECONDS, start)
        waiting = self._queue_of(share)
        waiting.append(share)
        self._grant_shares(requesting=share)
        if not share.is_granted and waiting is self._waiting and len(waiting) > self._max_waiting:
            waiting.remove(share)
            raise Overloaded("large requests that wait to be decoded (max_decode_bytes)")
        return share

    def finish_decoding(self, share: Share, num_bytes: int) -> None:
        """Note that a request is decoded, and keeps only this much memory, if that is less than its share."""
        kept_bytes = min(num_bytes, share.num_bytes)
        self._add(share, kept_bytes - share.num_bytes)
        share.num_bytes = kept_bytes
        self._end_slow(share)
        self._grant_shares()

    def release(self, share: Share) -> None:
        """Give a share back, granted or not. Does nothing if it was given back before."""
        if share.is_granted:
            share.is_granted = False
            self._add(share, -share.num_bytes)
            self._end_slow(share)
        elif share in (waiting := self._queue_of(share)):
            waiting.remove(share)
        self._grant_shares()

    def _queue_of(self, share: Share) -> deque[Share]:
        return self._waiting_small if share.is_small and not share.is_slow else self._waiting

    def _grant_shares(self, requesting: Share | None = None) -> None:
        """Grant what can be granted, in order of arrival, and start all but the one that is just being requested.

        A request that waits for memory holds up those behind it, since they could otherwise overtake it for ever. One
        that waits only for a thread does not.
        """
        for waiting in (self._waiting_small, self._waiting):
            for share in list(waiting):
                if share.is_slow and self._num_slow >= self._max_slow:
                    continue
                if not self._fits(share):
                    break
                waiting.remove(share)
                share.is_granted = True
                self._add(share, share.num_bytes)
                self._num_slow += share.is_slow
                if share is not requesting:
                    share.start()

    def _fits(self, share: Share) -> bool:
        if share.is_small:
            return self._small_bytes + share.num_bytes <= self._max_small_bytes or not share.num_bytes
        return self._large_bytes + share.num_bytes <= self._max_large_bytes

    def _add(self, share: Share, num_bytes: int) -> None:
        if share.is_small:
            self._small_bytes += num_bytes
        else:
            self._large_bytes += num_bytes

    def _end_slow(self, share: Share) -> None:
        self._num_slow -= share.is_slow
        share.is_slow = False
