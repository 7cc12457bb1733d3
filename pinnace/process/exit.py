"""The end of the process: its last line, its exit code, and a deadline that holds whatever the event loop does."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from pinnace.errors import StartupError, escape_unprintable
from pinnace.observability import log_writer
from pinnace.version import NAME

logger = logging.getLogger(__name__)

# After the end of the grace period the event loop has this long to end the process itself.
END_SECONDS = 0.7
# The last lines of the log have this long to be written.
REPORT_SECONDS = 2.0


def print_error(error: StartupError) -> None:
    """Print the line of an error that ends the process."""
    log_writer.print_error(f"{NAME}: {escape_unprintable(str(error))}")


def end_process(exit_code: int) -> NoReturn:
    """End the process at once: a thread, or Ray, may never come back."""
    logging.shutdown()
    log_writer.flush_standard_streams()
    os._exit(exit_code)


class StopDeadline:
    """Ends the process soon after the grace period, even if the event loop is blocked or its tasks do not end.

    Its methods may be called in signal handlers: all they do is put a message into a SimpleQueue, which is reentrant.
    """

    def __init__(self, grace_period_seconds: float, get_error: Callable[[], StartupError | None]) -> None:
        """Start the thread that waits for the deadline.

        Args:
            grace_period_seconds: The seconds from `start` to the deadline.
            get_error: Returns the error that the process ends with at its deadline; None stands for exit code 0. It is
                called in the thread.
        """
        self._grace_period_seconds = grace_period_seconds
        self._get_error = get_error
        self._messages: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._deadline: float | None = None
        threading.Thread(target=self._run, name="stop deadline", daemon=True).start()

    @property
    def left_seconds(self) -> float:
        """Return the seconds until the deadline, at least 0; the whole grace period before `start`."""
        if self._deadline is None:
            return self._grace_period_seconds
        return max(0.0, self._deadline - time.monotonic())

    def start(self) -> None:
        """Let the grace period begin, unless it has."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_period_seconds
            self._messages.put(self._deadline)

    def force(self) -> None:
        """Let the grace period end now."""
        self._deadline = time.monotonic()
        self._messages.put(self._deadline)

    def _run(self) -> None:
        deadline = self._messages.get()
        while True:
            try:
                deadline = self._messages.get(timeout=max(0.0, deadline + END_SECONDS - time.monotonic()))
            except queue.Empty:
                self._end()

    def _end(self) -> NoReturn:
        error = self._get_error()
        exit_code = error.exit_code if error else 0
        # In a thread: the main thread may hold a lock of logging, in a write to a pipe that nobody reads.
        threading.Thread(target=self._report_and_end, args=(error, exit_code), daemon=True).start()
        time.sleep(REPORT_SECONDS)
        os._exit(exit_code)

    def _report_and_end(self, error: StartupError | None, exit_code: int) -> NoReturn:
        logger.warning("the event loop did not stop within the grace period: ending the process anyway")
        if error:
            print_error(error)
        end_process(exit_code)
