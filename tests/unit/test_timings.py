"""The timings of one request, and how the metrics, the header and the log line show them."""

from __future__ import annotations

import logging
import re

import pytest

from pinnace.observability.metrics import Metrics, ReplicaMetrics
from pinnace.observability.timings import (
    RequestTimings,
    current_request_id,
    current_timings,
    start_timings,
)
from tests.unit.inference import MODEL, sample


def test_a_handler_is_timed_and_its_result_returned() -> None:
    timings = RequestTimings()

    assert timings.time_handler("preprocess", lambda text, times: text * times, "ab", times=2) == "abab"
    assert timings.handlers["preprocess"] > 0


def test_a_handler_that_raises_is_timed_too() -> None:
    timings = RequestTimings()

    with pytest.raises(KeyError):
        timings.time_handler("preprocess", dict[str, int]().__getitem__, "missing")
    assert "preprocess" in timings.handlers


def test_server_timing_has_the_handlers_in_order_and_the_rest_without_the_reading_of_the_body() -> None:
    timings = RequestTimings()
    timings.started_at -= 10.0
    timings.stages["read"] = 6.0
    timings.handlers |= {"predict": 2.0, "preprocess": 1.0}

    match = re.fullmatch(
        r"preprocess;dur=1000\.000, predict;dur=2000\.000, other;dur=(\d+\.\d{3})", timings.server_timing
    )
    assert match
    assert 1000 <= float(match[1]) < 2000


def test_the_latency_line_has_kserves_format(caplog: pytest.LogCaptureFixture) -> None:
    timings = RequestTimings("abc")
    timings.handlers["predict"] = 0.0125
    logger = logging.getLogger("kserve.trace")
    logger.addHandler(caplog.handler)
    level, logger.level = logger.level, logging.INFO
    try:
        timings.log_handlers()
    finally:
        logger.removeHandler(caplog.handler)
        logger.level = level

    expected = "requestId: abc, preprocess_ms: 0, explain_ms: 0, predict_ms: 12.5, postprocess_ms: 0"
    assert caplog.messages[-1] == expected


async def test_the_timings_that_were_started_last_are_the_current_ones_of_their_task() -> None:
    timings = start_timings("abc")

    assert current_timings() is timings
    assert current_request_id() == "abc"


def test_a_request_that_has_ended_is_observed_once_in_each_metric() -> None:
    metrics, timings = Metrics(), RequestTimings()
    timings.model_name = MODEL
    timings.stages["decode"] = 0.01
    timings.record_run(0.02)

    metrics.observe_request("v1", "answered", timings, received_bytes=10, sent_bytes=4)

    assert sample(metrics, "pinnace_requests_total", protocol="v1", outcome="answered") == 1
    assert sample(metrics, "pinnace_received_bytes_total", protocol="v1") == 10
    assert sample(metrics, "pinnace_sent_bytes_total", protocol="v1") == 4
    assert sample(metrics, "pinnace_stage_seconds_sum", stage="decode") == 0.01
    assert sample(metrics, "pinnace_stage_seconds_sum", stage="infer") == 0.02
    assert sample(metrics, "request_predict_seconds_sum", model_name=MODEL) == 0.02


def test_what_a_replica_records_is_repeated_by_the_server() -> None:
    replica, server = ReplicaMetrics(), Metrics()
    replica.count_batch(MODEL, "idle")
    replica.observe_batch_rows(MODEL, 3)
    replica.count_dropped(MODEL, 2)

    calls = replica.drain()
    server.replay(calls)

    assert replica.drain() == []
    assert sample(server, "pinnace_batches_total", model_name=MODEL, reason="idle") == 1
    assert sample(server, "pinnace_batch_rows_sum", model_name=MODEL) == 3
    assert sample(server, "pinnace_dropped_requests_total", model_name=MODEL) == 2
