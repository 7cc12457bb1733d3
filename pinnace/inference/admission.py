"""Admission: limits on what is in flight, and an estimate of when there will be capacity again.

An unbounded queue makes every answer late. Requests beyond these limits are rejected immediately.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pinnace.errors import Overloaded, TooLarge
from pinnace.settings import Settings

RATE_WINDOW = 32  # completed requests from which the rate of a model is estimated


@dataclass(eq=False, slots=True)
class Permit:
    """The right of one request to be in flight. `num_rows` is 1 until a worker thread has decoded the request."""

    num_rows: int = 1


class Admission:
    """Limits the requests in flight of one model, by their number and by their rows. Used on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._permits: set[Permit] = set()
        self._busy_seconds = 0.0  # accumulated before the current busy period
        self._busy_since = 0.0
        self._completions: deque[float] = deque([0.0], RATE_WINDOW + 1)  # times, on the clock of busy seconds

    @property
    def in_flight(self) -> int:
        """Return the number of permits that are held."""
        return len(self._permits)

    def check(self) -> None:
        """Raise Overloaded if no permit is available now."""
        if self.in_flight >= self._settings.max_concurrent_requests:
            raise Overloaded("requests (max_concurrent_requests)", self._retry_after_seconds())
        if sum(permit.num_rows for permit in self._permits) >= self._settings.max_queue_rows:
            raise Overloaded("rows (max_queue_rows)", self._retry_after_seconds())

    @contextmanager
    def admit(self) -> Iterator[Permit]:
        """Hold a permit for the body of a `with` statement. Raises Overloaded."""
        self.check()
        if not self._permits:
            self._busy_since = time.monotonic()
        permit = Permit()
        self._permits.add(permit)
        try:
            yield permit
        finally:
            self._permits.remove(permit)
            self._completions.append(self._busy_clock())
            if not self._permits:
                self._busy_seconds = self._busy_clock()

    def _busy_clock(self) -> float:
        """Return the seconds in which anything was in flight: idle time does not lower the estimated rate."""
        return self._busy_seconds + time.monotonic() - self._busy_since

    def _retry_after_seconds(self) -> float:
        """Estimate how long the requests in flight take, at the rate of the last completions."""
        completed = len(self._completions) - 1
        if not completed:
            return 1.0
        seconds_per_request = (self._busy_clock() - self._completions[0]) / completed
        return min(self.in_flight * seconds_per_request, self._settings.request_timeout_seconds)


def check_max_rows(num_rows: int, settings: Settings) -> None:
    """Raise TooLarge if one request has more rows than max_instances."""
    if num_rows > settings.max_instances:
        raise TooLarge(f"{num_rows} instances exceed max_instances ({settings.max_instances})")


class ByteBudget:
    """Limits the bytes of all bodies and messages in memory: those still being received, and those not sent yet.

    When bytes are missing, the functions in `reclaimers` are called with their number: they end the connections or
    calls whose responses have waited longest.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._reserved_bytes = 0
        self.reclaimers: list[Callable[[int], None]] = []

    def acquire(self, size_bytes: int) -> None:
        """Reserve bytes until `release`. Never waits: raises Overloaded if they do not fit."""
        if not self._make_room(size_bytes):
            raise Overloaded("bytes (max_queue_bytes)")
        self._reserved_bytes += size_bytes

    def charge(self, size_bytes: int) -> None:
        """Reserve bytes of a response until `release`. They are never refused, but others may be reclaimed for them."""
        self._reserved_bytes += size_bytes
        self._make_room(0)

    def release(self, size_bytes: int) -> None:
        """Give back bytes that were reserved."""
        self._reserved_bytes -= size_bytes

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Reserve bytes for the body of a `with` statement. Raises Overloaded."""
        self.acquire(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    def _make_room(self, size_bytes: int) -> bool:
        """Return whether the bytes fit, once what can be reclaimed for them is reclaimed."""
        if size_bytes <= self._max_bytes:
            for reclaim in self.reclaimers:
                if (num_missing := self._reserved_bytes + size_bytes - self._max_bytes) > 0:
                    reclaim(num_missing)
        return self._reserved_bytes + size_bytes <= self._max_bytes
