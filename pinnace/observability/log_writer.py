"""Log lines on standard output and standard error, written so that requests never wait for a slow reader.

A pipe holds 64 KiB. Once nobody reads it, the next write waits, on the event loop for ever: the server answered 577
requests, and then neither probes nor SIGTERM. Here a line is written at once only if a pipe is nearly empty. Otherwise
it waits in a queue for a thread that writes, and beyond the queue's limit it is dropped and counted. A thread for every
line would cost a request 35 µs of CPU more (measured).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import stat
import sys
import termios
import threading
import time
from array import array
from contextlib import suppress
from queue import SimpleQueue
from typing import TextIO

logger = logging.getLogger(__name__)

MAX_QUEUED_CHARACTERS = 1024 * 1024  # the lines of 15 s at 300 requests per second
MAX_WRITE_BYTES = select.PIPE_BUF  # as much as workers that share a pipe can write without mixing their lines
# A line that is written at once takes one of a pipe's pages, and a quarter of its bytes at most half of its pages: the
# others are for workers that write to the same pipe at the same moment.
MAX_DIRECT_CHARACTERS = MAX_WRITE_BYTES // 4
MIN_PIPE_BYTES = 64 * 1024
FLUSH_SECONDS = 5  # a stop waits as long for a slow reader, and a second for one that does not read at all
REPORT_SECONDS, STUCK_REPORT_SECONDS = 1.0, 10.0
NAMES = {1: "standard output", 2: "standard error"}


class LineWriter:
    """Writes lines to a file descriptor, in order. Safe to use from any thread and any signal handler."""

    def __init__(self, stream: TextIO) -> None:
        """Prepare to write to the file of a stream, after what its streams have in their buffers."""
        self.streams = [stream]
        self._descriptor = os.dup(stream.fileno())  # its own, since a thread may be in a write while the stream closes
        self._name = NAMES.get(stream.fileno(), f"file descriptor {stream.fileno()}")
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()  # reentrant, since a signal handler may log
        self._thread: threading.Thread | None = None
        self._is_direct = False
        self._max_unread_bytes = _pipe_bytes(self._descriptor) // 4
        self._unread_bytes = array("i", [0])
        self._num_queued = self._num_written = 0  # characters
        self._num_dropped = self._num_reported = 0  # lines
        self._problem = ""
        self._reported_at = -STUCK_REPORT_SECONDS
        self.is_stuck = False

    def write(self, line: str) -> None:
        """Write a line if that takes no time, else queue it, or drop it if too many wait."""
        with self._lock:
            if self._is_direct or self._can_write_now(line) or not self._start():
                self._write([line])
            elif self._has_room():
                self._num_queued += len(line)
                self._lines.put(line)
            else:
                self._drop(1, "is not read fast enough")

    def next_report(self) -> str:
        """Return what to log about dropped lines now; empty for nothing.

        While nothing can be written, that is a line every 10 s, which another stream may show.
        """
        if self._num_dropped == self._num_reported:
            return ""
        with self._lock:
            now = time.monotonic()
            if now - self._reported_at < (REPORT_SECONDS if self._has_room() else STUCK_REPORT_SECONDS):
                return ""
            self._reported_at = now
            self._num_reported = self._num_dropped
            return f"{self._num_dropped} log lines were dropped since the start: {self._name} {self._problem}"

    def flush(self) -> bool:
        """Wait until all lines are written; a second if none can be, else FLUSH_SECONDS. Return whether they are."""
        if not self._thread or self.is_stuck:
            return not self.is_stuck
        flushed = threading.Event()
        self._lines.put(flushed)
        for _ in range(FLUSH_SECONDS):
            num_written = self._num_written
            if flushed.wait(1.0):
                return True
            if num_written == self._num_written:
                break
        self.is_stuck = True
        return False

    def write_directly(self) -> None:
        """Write without a thread from now on: a forked process has none."""
        self._lock = threading.RLock()
        self._thread, self._is_direct = None, True

    def _can_write_now(self, line: str) -> bool:
        """Return whether no line is queued, and a write to the pipe cannot wait."""
        if not self._max_unread_bytes or self._num_queued != self._num_written or len(line) > MAX_DIRECT_CHARACTERS:
            return False
        fcntl.ioctl(self._descriptor, termios.FIONREAD, self._unread_bytes)
        return self._unread_bytes[0] <= self._max_unread_bytes

    def _has_room(self) -> bool:
        return self._num_queued - self._num_written <= MAX_QUEUED_CHARACTERS

    def _start(self) -> bool:
        """Start the thread unless it runs. Return False if it cannot start."""
        if not self._thread:
            thread = threading.Thread(target=self._run, name="log writer", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # out of threads, or the interpreter is ending
                self._is_direct = True
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            lines: list[str] = []
            flushed: list[threading.Event] = []
            num_characters = 0
            while num_characters == 0 or not (num_characters > MAX_WRITE_BYTES // 2 or self._lines.empty()):
                item = self._lines.get()
                if isinstance(item, str):
                    lines.append(item)
                    num_characters += len(item)
                else:
                    flushed.append(item)
                    break
            self._write(lines)
            self._num_written += num_characters
            for event in flushed:
                event.set()

    def _write(self, lines: list[str]) -> None:
        data = b""
        try:
            for stream in self.streams:
                if not stream.closed:
                    stream.flush()
            for line in lines:
                encoded = line.encode(self.streams[0].encoding or "utf-8", "backslashreplace")
                if data and len(data) + len(encoded) > MAX_WRITE_BYTES:
                    self._write_bytes(data)
                    data = b""
                data += encoded
            self._write_bytes(data)
        except (OSError, RuntimeError, ValueError) as error:  # the last two are of a stream that closes just now
            error_number = getattr(error, "errno", None) or errno.EIO
            with self._lock:
                self._drop(len(lines), f"cannot be written ({os.strerror(error_number)})")

    def _write_bytes(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
                self.is_stuck = False
            except BlockingIOError:  # another process has made the file non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()

    def _drop(self, num_lines: int, problem: str) -> None:
        self._num_dropped += num_lines
        self._problem = problem


def _pipe_bytes(descriptor: int) -> int:
    """Return how many bytes a pipe holds; 0 for other files, for a small pipe, and for one that keeps writes apart."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        return 0
    num_bytes = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
    return num_bytes if num_bytes >= MIN_PIPE_BYTES else 0


_writers: dict[tuple[int, int], LineWriter] = {}
"""The writers by the device and inode of their files: streams that go to the same file keep their order."""


def _write_directly() -> None:
    for writer in _writers.values():
        writer.write_directly()


os.register_at_fork(after_in_child=_write_directly)


def _writer(stream: TextIO | None) -> LineWriter | None:
    """Return the writer of a stream's file; None if the stream has none."""
    try:
        if stream is None:
            return None
        status = os.fstat(stream.fileno())
        key = status.st_dev, status.st_ino
        if key not in _writers:
            _writers[key] = LineWriter(stream)
    except (OSError, ValueError):  # it is closed, or no file
        return None
    writer = _writers[key]
    if stream not in writer.streams:
        writer.streams.append(stream)
    return writer


class QueuedStreamHandler(logging.StreamHandler[TextIO]):
    """A handler that leaves the writing to its stream's LineWriter; for standard output and standard error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._writer = _writer(self.stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line, and log how many lines had to be dropped, if any."""
        if not self._writer:
            if self.stream:
                super().emit(record)
            return
        try:
            self._writer.write(self.format(record) + self.terminator)
        except Exception:
            self.handleError(record)
        if report := self._writer.next_report():
            logger.warning(report)

    def flush(self) -> None:
        """Wait until the queued lines are written, or cannot be."""
        if self._writer:
            self._writer.flush()


def print_error(line: str) -> None:
    """Write a line to standard error after the log lines that are queued, and wait for it as `flush` does."""
    if not sys.stderr:
        return
    if writer := _writer(sys.stderr):
        writer.write(f"{line}\n")
        writer.flush()
    else:
        sys.stderr.write(f"{line}\n")


def flush_standard_streams() -> None:
    """Flush standard output and standard error, unless nobody reads them."""
    for stream in (sys.stdout, sys.stderr):
        writer = _writer(stream)
        if stream and not (writer and not writer.flush()):
            with suppress(OSError, RuntimeError, ValueError):  # nobody reads it, or a signal has interrupted just that
                stream.flush()
