"""What may be under way at once, and when there will be room again.

A queue without bounds answers everybody late; behind these, whoever comes too many is refused at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pinnace.errors import Overloaded, TooLarge
from pinnace.settings import Settings

RATE_WINDOW = 32  # the last so many tell how fast a model answers


@dataclass(eq=False, slots=True)
class Permit:
    """One request under way; its rows are known once it is decoded, on another thread."""

    rows: int = 1


class Admission:
    """The requests under way of one model, bounded in their number and in their rows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tickets: set[Permit] = set()
        self._busy_seconds = 0.0  # up to when it was idle last
        self._busy_since = 0.0
        self._completions: deque[float] = deque([0.0], RATE_WINDOW + 1)  # on the clock of busy seconds

    @property
    def in_flight(self) -> int:
        return len(self._tickets)

    def check(self) -> None:
        """Raises Overloaded."""
        if self.in_flight >= self._settings.max_concurrent_requests:
            raise Overloaded("requests (max_concurrent_requests)", self._retry_after_seconds())
        if sum(ticket.rows for ticket in self._tickets) >= self._settings.max_queue_rows:
            raise Overloaded("rows (max_queue_rows)", self._retry_after_seconds())

    @contextmanager
    def ticket(self) -> Iterator[Permit]:
        """Around one request. Raises Overloaded."""
        self.check()
        if not self._tickets:
            self._busy_since = time.monotonic()
        ticket = Permit()
        self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)
            self._completions.append(self._clock())
            if not self._tickets:
                self._busy_seconds = self._clock()

    def _clock(self) -> float:
        """Runs while anything is under way: an idle time is no slow one."""
        return self._busy_seconds + time.monotonic() - self._busy_since

    def _retry_after_seconds(self) -> float:
        """What is under way, at the pace of the last requests."""
        ended = len(self._completions) - 1
        if not ended:
            return 1.0
        pace_seconds = (self._clock() - self._completions[0]) / ended
        return min(self.in_flight * pace_seconds, self._settings.request_timeout_seconds)


def check_instances(rows: int, settings: Settings) -> None:
    """Of one request. Raises TooLarge."""
    if rows > settings.max_instances:
        raise TooLarge(f"{rows} instances exceed max_instances ({settings.max_instances})")


class ByteBudget:
    """The bytes of all bodies and messages in memory, those that are still coming included."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    def take(self, size_bytes: int) -> None:
        """To be given back. Raises Overloaded."""
        if self._held_bytes + size_bytes > self._max_bytes:
            raise Overloaded("bytes (max_queue_bytes)")
        self._held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes

    @contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        """Around the life of a whole message. Raises Overloaded."""
        self.take(size_bytes)
        try:
            yield
        finally:
            self.give_back(size_bytes)
