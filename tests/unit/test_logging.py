"""pinnace/observability/logging.py and access_log.py: no text can split a log line, or command a terminal."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pinnace.observability.access_log import log_request
from pinnace.observability.logging import JsonFormatter, configure_logging
from pinnace.observability.timings import start_timings

CONTROLS = "\x00\t\r\n\x1b[31m\x7f\x85\x9b\u2028\u2029\u202e\u2066\udce9"
ESCAPED = r"\x00\t\r\n\x1b[31m\x7f\x85\x9b\u2028\u2029\u202e\u2066\udce9"

Log = Callable[[logging.Formatter], io.StringIO]


@pytest.fixture
def log_to() -> Iterator[Log]:
    """Return a function that sends every log line to a stream, in the format of a formatter that is not ours."""
    root = logging.getLogger()
    handlers, level, factory = root.handlers, root.level, logging.getLogRecordFactory()

    def set_up(formatter: logging.Formatter) -> io.StringIO:
        configure_logging({"version": 1, "root": {"level": "INFO"}})
        stream = io.StringIO()
        root.handlers = [logging.StreamHandler(stream)]
        root.handlers[0].setFormatter(formatter)
        return stream

    yield set_up
    root.handlers = handlers
    root.setLevel(level)
    logging.setLogRecordFactory(factory)


def raise_hostile_errors() -> None:
    try:
        raise ValueError(f"cause{CONTROLS}\n2026-01-01 a forged line")
    except ValueError as error:
        failure = RuntimeError(f"text{CONTROLS}\n2026-01-01 a forged line")
        failure.add_note(f"note{CONTROLS}\n2026-01-01 a forged line")
        raise ExceptionGroup("group\n2026-01-01 a forged line", [failure]) from error


@pytest.mark.parametrize("logger", ["pinnace.http", "hypercorn.error", "mine"])
def test_a_message_of_any_logger_is_one_printable_line(logger: str, log_to: Log) -> None:
    stream = log_to(logging.Formatter("%(message)s"))

    logging.getLogger(logger).error("é 😀 %s", CONTROLS)

    assert stream.getvalue() == f"é 😀 {ESCAPED}\n"


def test_a_traceback_has_several_lines_but_none_of_the_texts_of_its_exceptions_does(log_to: Log) -> None:
    stream = log_to(logging.Formatter("> %(message)s"))

    try:
        raise_hostile_errors()
    except ExceptionGroup:
        logging.getLogger("mine").exception("failed")

    lines = stream.getvalue().split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "> failed"
    assert rf"ValueError: cause{ESCAPED}\n2026-01-01 a forged line" in lines
    assert r"  | ExceptionGroup: group\n2026-01-01 a forged line (1 sub-exception)" in lines
    assert rf"    | RuntimeError: text{ESCAPED}\n2026-01-01 a forged line" in lines
    assert any("in raise_hostile_errors" in line for line in lines)
    assert not [line for line in lines if line.startswith("2026")]


def test_a_json_record_is_one_line_of_valid_json_for_every_reader(log_to: Log) -> None:
    stream = log_to(JsonFormatter())

    start_timings(f"id{CONTROLS}")
    try:
        raise_hostile_errors()
    except ExceptionGroup:
        logging.getLogger("mine").exception("é 😀 %s", CONTROLS, extra={"field": CONTROLS, "flag": "\U000e0001"})

    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    entry = json.loads(line)
    assert (entry["message"], entry["request_id"]) == (f"é 😀 {ESCAPED}", f"id{ESCAPED}")
    assert entry["field"] == CONTROLS.replace("\udce9", r"\udce9")
    assert entry["flag"] == "\U000e0001"
    assert rf"RuntimeError: text{ESCAPED}\n2026-01-01 a forged line" in entry["exception"]


def make_hostile_scope() -> dict[str, Any]:
    hostile = CONTROLS[:-5].encode("latin-1")
    return {
        "client": ("::1", 1),
        "method": f"GET{CONTROLS}",
        "raw_path": b"/" + hostile,
        "query_string": hostile,
        "http_version": "2",
        "headers": [(b"x-request-id", hostile)],
    }


@pytest.mark.parametrize("access_log_format", ["", "%(m)s %(r)s %(R)s %(U)s %(q)s %({x-request-id}i)s %({x-sent}o)s"])
def test_an_access_line_is_printable(access_log_format: str, log_to: Log) -> None:
    stream = log_to(logging.Formatter("%(message)s"))

    log_request(access_log_format, make_hostile_scope(), 200, 0, [(b"x-sent", b"\x1b\n")], 0.0)

    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert r"\x1b[31m\x7f\x85\x9b" in line


def test_a_tab_of_an_access_log_format_stays_a_tab(log_to: Log) -> None:
    stream = log_to(logging.Formatter("%(message)s"))

    log_request("%(s)s\t%(U)s", make_hostile_scope(), 200, 0, (), 0.0)

    assert stream.getvalue() == f"200\t/{ESCAPED[: ESCAPED.index(chr(92) + 'u2028')]}\n"
