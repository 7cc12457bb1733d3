"""bench: the measurements are real, and the reports print them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from bench import load, soak
from bench.__main__ import Reference, parse_reference
from bench.baseline import InProcessBaseline
from bench.payloads import Payload, make_payloads
from bench.report import Point, compute_medians, compute_ratios, format_ratios, format_table, plot
from bench.server_process import run_pinnace
from bench.soak import Sample
from tests.support.servers import PROJECT, Server

REQUEST = PROJECT / "examples/input.json"


@pytest.mark.parametrize("payload", make_payloads(REQUEST), ids=lambda payload: payload.name)
def test_every_payload_is_answered(payload: Payload, server: Server) -> None:
    if payload.path:
        response = httpx.post(server.url + payload.path, content=payload.body, headers=payload.headers, timeout=60)
        assert response.status_code == 200, response.text
    else:
        result = load.send_grpc(server.grpc_address, payload, connections=2, seconds=0.5)
        assert (result.requests > 0, result.failed) == (True, 0)
        assert 0 < result.p50_ms <= result.p99_ms


def test_memory_and_cpu_time_include_the_workers(model_dir: Path) -> None:
    with run_pinnace(model_dir, "--workers=2") as server:
        server.wait_until_idle()  # the other worker may still load
        assert len(server.process_ids) == 3
        assert 0 < server.memory_mib("Pss") < server.memory_mib("Rss")
        assert server.cpu_seconds() > 0
        assert server.ready_seconds < 60

    assert not Path(f"/proc/{server.process_id}").exists()


def test_the_in_process_baseline_is_measured_in_a_process_of_its_own(model_dir: Path) -> None:
    images_per_second, seconds_per_image = InProcessBaseline(model_dir, REQUEST, seconds=0.5).measure_again()

    assert images_per_second > 1
    assert 0 < seconds_per_image < 1


def test_a_row_has_medians_over_the_rounds_of_ratios_within_a_round(tmp_path: Path) -> None:
    results = [load.Result(per_second, 10.0, 20.0, 100, 1) for per_second in (40.0, 90.0, 50.0)]
    in_process = (80.0, 90.0, 50.0)
    points = [
        Point("V1 JSON", 16, result, 25.0, per_second, 8.0)
        for result, per_second in zip(results, in_process, strict=True)
    ]

    (row,) = compute_medians(points)

    assert (row.per_second, row.share_of_in_process, row.added_ms, row.failed) == (50.0, 1.0, 2.0, 3)
    assert "| V1 JSON | 16 | 50.0 | 1.00 | 10.0 | 20.0 | 25.0 |  | 3 |" in format_table([row])
    plot({"fp32": [row]}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("", None),
        ("serve http://127.0.0.1:9080", Reference(["serve"], "http://127.0.0.1:9080", "")),
        (
            "sh -c 'cd /old && exec python app.py' http://127.0.0.1:9080 127.0.0.1:9081",
            Reference(["sh", "-c", "cd /old && exec python app.py"], "http://127.0.0.1:9080", "127.0.0.1:9081"),
        ),
    ],
)
def test_a_reference_server_is_a_command_a_url_and_maybe_a_grpc_address(text: str, reference: Reference | None) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:9080", "serve", "serve 127.0.0.1:9081", "serve http://127.0.0.1:9080 grpc"]
)
def test_a_reference_server_that_cannot_be_parsed_is_an_error_that_says_how(text: str) -> None:
    with pytest.raises(SystemExit, match=r'BENCH_BASELINE must be "COMMAND URL \[GRPC_HOST:PORT\]", not '):
        parse_reference(text)


def test_ratios_are_medians_over_the_rounds_of_this_server_over_the_reference() -> None:
    def point(name: str, per_second: float, cpu_ms: float, is_reference: bool = False) -> Point:
        result = load.Result(per_second, 10.0, 20.0, 100, 0)
        return Point(name, 16, result, cpu_ms, 80.0, 8.0, is_reference)

    points = []
    for ours, reference in ((90.0, 100.0), (50.0, 40.0), (110.0, 100.0)):
        points += [point("V1 JSON", ours, 12.0), point("V1 JSON", reference, 10.0, True), point("gRPC bytes", 1.0, 1.0)]

    (ratio,) = compute_ratios(points)

    assert (ratio.name, ratio.connections) == ("V1 JSON", 16)
    assert "| V1 JSON | 16 | 1.10 | 0.90 to 1.25 | 1.20 | 0 |" in format_ratios([ratio])
    assert [row.name for row in compute_medians(points)] == ["V1 JSON", "V1 JSON, reference server", "gRPC bytes"]


def test_growing_memory_shows_in_the_second_half_of_a_soak(tmp_path: Path) -> None:
    result = load.Result(50.0, 10.0, 20.0, 100, 0)
    samples = [Sample(minute * 60.0, 300.0 + max(0, minute - 10), 20, result) for minute in range(31)]

    text = soak.summarize(samples)

    assert "30 minutes, 3100 requests, 0 failed" in text
    assert "at most 304 in the first half and 320 in the second" in text
    soak.plot(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_soak_of_a_single_slice_has_a_summary() -> None:
    text = soak.summarize([Sample(10.0, 300.0, 20, load.Result(50.0, 10.0, 20.0, 100, 0))])

    assert "at most 300 in the first half and 300 in the second" in text
