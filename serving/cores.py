"""Turns at the CPU cores, which all models share.

Decoding and a run that takes every core take turns: side by side on two cores they cost 4 to 13 % more CPU a request
(measured), since a thread of ONNX Runtime spins while it waits for one that a decoder has displaced. So do such runs of
several models.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Cores:
    """Runs that take every core have them one after the other, in the order of asking."""

    def __init__(self) -> None:
        self._asked = self._served = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._changed:
            turn = self._asked
            self._asked += 1
            self._changed.wait_for(lambda: self._served == turn)
        try:
            yield
        finally:
            with self._changed:
                self._served += 1
                self._changed.notify_all()

    def await_free(self) -> None:
        """Before decoding: returns when no run has taken them or is about to."""
        with self._changed:
            self._changed.wait_for(lambda: self._served == self._asked)
