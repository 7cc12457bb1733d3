"""bench: the measurements are real, and the report shows them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from bench import load, soak
from bench.baseline import Baseline
from bench.payloads import Payload, payloads
from bench.report import Point, medians, plot, table
from bench.soak import Sample
from bench.subject import serving
from tests.support.servers import PROJECT, Server

REQUEST = PROJECT / "examples/input.json"


@pytest.mark.parametrize("payload", payloads(REQUEST), ids=lambda payload: payload.name)
def test_every_payload_is_answered(payload: Payload, server: Server) -> None:
    if payload.path:
        response = httpx.post(server.url + payload.path, content=payload.body, headers=payload.headers, timeout=60)
        assert response.status_code == 200, response.text
    else:
        result = load.grpc_calls(server.grpc_address, payload, connections=2, seconds=0.5)
        assert (result.requests > 0, result.failed) == (True, 0)
        assert 0 < result.p50_ms <= result.p99_ms


def test_memory_and_cpu_of_the_server_and_its_workers_are_measured(model_dir: Path) -> None:
    with serving(model_dir, "--workers=2") as subject:
        subject.settle()  # one worker answers already, the other may still be loading
        assert len(subject.process_ids) == 3
        assert 0 < subject.memory_mib("Pss") < subject.memory_mib("Rss")
        assert subject.cpu_seconds() > 0
        assert subject.ready_seconds < 60

    assert not Path(f"/proc/{subject.process_id}").exists()


def test_the_baseline_is_measured_in_a_process_of_its_own(model_dir: Path) -> None:
    images_per_second, alone_seconds = Baseline(model_dir, REQUEST, seconds=0.5).around()

    assert images_per_second > 1
    assert 0 < alone_seconds < 1


def test_a_row_is_the_median_of_its_rounds_and_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    results = [load.Result(per_second, 10.0, 20.0, 100, 1) for per_second in (40.0, 90.0, 50.0)]
    baseline = (80.0, 90.0, 50.0)
    points = [
        Point("V1 JSON", 16, result, 25.0, baseline, 8.0) for result, baseline in zip(results, baseline, strict=True)
    ]

    (row,) = medians(points)

    assert (row.per_second, row.of_limit, row.added_ms, row.failed) == (50.0, 1.0, 2.0, 3)
    assert "| V1 JSON | 16 | 50.0 | 1.00 | 10.0 | 20.0 | 25.0 |  | 3 |" in table([row])
    plot({"fp32": [row]}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_memory_that_grows_shows_in_the_second_half_of_a_soak(tmp_path: Path) -> None:
    result = load.Result(50.0, 10.0, 20.0, 100, 0)
    samples = [Sample(minute * 60.0, 300.0 + max(0, minute - 10), 20, result) for minute in range(31)]

    text = soak.summary(samples)

    assert "30 minutes, 3100 requests, 0 failed" in text
    assert "at most 304 in the first half and 320 in the second" in text
    soak.plot(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_soak_of_one_sample_has_a_summary() -> None:
    text = soak.summary([Sample(10.0, 300.0, 20, load.Result(50.0, 10.0, 20.0, 100, 0))])

    assert "at most 300 in the first half and 300 in the second" in text
