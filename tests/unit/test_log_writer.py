"""pinnace/observability/log_writer.py: log lines whose reader is slow, stops, or is gone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TextIO

import pytest

from pinnace.observability.log_writer import MAX_QUEUED_CHARACTERS, QueuedStreamHandler
from tests.support.waiting import wait_for

LINE = "x" * 10_000
LINES = 2 * MAX_QUEUED_CHARACTERS // len(LINE)


@pytest.fixture
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    """Open a pipe: its end for reading, and its end for writing."""
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as writer:
        yield reader, writer


def make_logger(stream: TextIO) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(QueuedStreamHandler(stream))
    return logger


def test_lines_are_written_in_order_after_what_is_printed(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    logger = make_logger(writer)

    writer.write("printed\n")
    for number in range(1000):
        logger.info("%d", number)

    assert [reader.readline() for _ in range(1001)] == ["printed\n", *(f"{number}\n" for number in range(1000))]


def test_lines_that_nobody_reads_are_dropped_and_counted(
    pipe: tuple[TextIO, TextIO], caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = pipe
    logger = make_logger(writer)

    for number in range(LINES):
        logger.info("%d %s", number, LINE)
    assert "is not read fast enough" in caplog.text
    caplog.clear()
    written = [reader.readline() for _ in range(50)]

    def is_reported() -> bool:
        written.append(reader.readline())
        logger.info("after")
        return bool(caplog.records)

    wait_for(is_reported, "a line that says how many were dropped")
    numbers = [int(line.split()[0]) for line in written if line.endswith("x\n")]
    while (line := reader.readline()) != "after\n":
        numbers.append(int(line.split()[0]))
    (report,) = caplog.messages
    assert numbers == sorted(set(numbers))
    assert report.startswith(f"{LINES - len(numbers)} log lines were dropped since the start: file descriptor ")


def test_a_line_to_a_pipe_that_is_read_is_written_at_once(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    os.set_blocking(reader.fileno(), False)
    logger = make_logger(writer)

    for _ in range(100):
        logger.info("now")
        assert os.read(reader.fileno(), 100) == b"now\n"


def test_lines_keep_their_order_when_the_pipe_fills_and_empties(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    logger = make_logger(writer)

    found: list[str] = []
    for number in range(4000):  # more than the pipe takes without the thread
        logger.info("%d %s", number, LINE[:100])
        if number % 1000 > 700 and len(found) < number:
            found += [reader.readline(), reader.readline()]
    logger.info("end")
    while (line := reader.readline()) != "end\n":
        found.append(line)

    assert [int(line.split()[0]) for line in found] == list(range(4000))


def test_a_flush_waits_for_a_reader_but_not_for_ever(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    logger = make_logger(writer)
    for number in range(LINES):
        logger.info("%d %s", number, LINE)

    for handler in logger.handlers * 10:
        handler.flush()
    assert reader.readline().startswith("0 ")


def test_lines_that_cannot_be_written_are_counted(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as stream:
        logger = make_logger(stream)
        logger.info("first")
        (handler,) = logger.handlers
        handler.flush()
        logger.info("second")
        handler.flush()

    (report,) = caplog.messages
    assert report.startswith("1 log lines were dropped since the start: file descriptor ")
    assert report.endswith("cannot be written (No space left on device)")
    assert capfd.readouterr() == ("", "")


def test_lines_survive_a_file_that_another_process_made_non_blocking(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    os.set_blocking(writer.fileno(), False)
    logger = make_logger(writer)

    for number in range(50):
        logger.info("%d %s", number, LINE)

    assert [int(reader.readline().split()[0]) for _ in range(50)] == list(range(50))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # of Python 3.12
def test_a_forked_process_writes_its_lines_itself(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    logger = make_logger(writer)
    logger.info("parent")
    assert reader.readline() == "parent\n"

    if (child := os.fork()) == 0:
        logger.info("child")
        os._exit(0)

    assert os.waitpid(child, 0)[1] == 0
    assert reader.readline() == "child\n"
