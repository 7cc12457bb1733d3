"""Throughput, latency and cost of the server, beside the bare loop on the same cores in the same minutes: `make bench`.

Machines are noisy: the limit is measured before and after each point, and what is printed is the median of the rounds.
BENCH_BASELINE="command URL" in the environment puts another server beside it, asked in V1 JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from bench import load
from bench.baseline import Baseline
from bench.payloads import Payload, payloads
from bench.report import Point, Row, medians, plot, table
from bench.subject import ServerProcess, memory_mib, serving, started
from pinnace.cpus import available_cpus
from pinnace.runtimes.onnx import load_onnxruntime

CONNECTIONS = (1, 16, 64)
WARM_UP_SECONDS = 1.0
LOADED_SECONDS = 20.0


def main() -> None:
    arguments = _arguments()
    _say(
        f"{_cpu_name()}, {available_cpus()} CPUs, which the load shares; Python {platform.python_version()}, "
        f"ONNX Runtime {load_onnxruntime().__version__}. Request {arguments.request}; "
        f"median of {arguments.rounds} rounds of {arguments.seconds:g} s."
    )
    rows: dict[str, list[Row]] = {}
    for named in arguments.model:
        name, _, folder = named.rpartition("=")
        rows[name or folder] = _measure(name or folder, Path(folder), arguments)
    plot(rows, arguments.plot)
    _say(f"\nthroughput against latency: {arguments.plot}")


def _measure(name: str, model_dir: Path, arguments: argparse.Namespace) -> list[Row]:
    wanted = [one for one in payloads(arguments.request) if not arguments.only or one.name in arguments.only]
    points: list[Point] = []
    for count in range(1, arguments.rounds + 1):
        for point in _round(model_dir, wanted, arguments):
            points.append(point)
            sys.stderr.write(f"{name}, round {count}: {point}\n")
    rows = medians(points)
    baseline, alone_ms = median(point.baseline for point in points), median(point.alone_ms for point in points)
    _say(f"\n{name}: in process {baseline:.1f} images/s, one image alone {alone_ms:.1f} ms")
    _say(table(rows))
    _say(_footprint(model_dir, wanted[0]))
    return rows


def _round(model_dir: Path, wanted: list[Payload], arguments: argparse.Namespace) -> Iterator[Point]:
    baseline = Baseline(model_dir, arguments.request, arguments.seconds)

    def points(subject: ServerProcess, payload: Payload, name: str) -> Iterator[Point]:
        for connections in CONNECTIONS:
            result, cpu_ms = _measured(subject, payload, connections, arguments.seconds)
            images_per_second, alone_seconds = baseline.around()
            yield Point(name, connections, result, cpu_ms, images_per_second, alone_seconds * 1e3)

    with serving(model_dir) as subject:
        for payload in wanted:
            yield from points(subject, payload, payload.name)
    with serving(model_dir, f"--workers={available_cpus()}") as subject:
        yield from points(subject, wanted[0], f"{wanted[0].name}, {available_cpus()} workers")
    if find_spec("ray"):
        with serving(model_dir, "--engine=ray", f"--num_replicas={available_cpus()}") as subject:
            yield from points(subject, wanted[0], f"{wanted[0].name}, {available_cpus()} replicas on Ray")
    if other := os.environ.get("BENCH_BASELINE"):
        *command, url = shlex.split(other)
        with started(command, url) as subject:
            yield from points(subject, wanted[0], "baseline")


def _measured(subject: ServerProcess, payload: Payload, connections: int, seconds: float) -> tuple[load.Result, float]:
    """What the clients saw, and the server's CPU milliseconds a request."""

    def run(duration: float) -> load.Result:
        return load.send(subject.url, subject.grpc_address, payload, connections, duration)

    run(WARM_UP_SECONDS)
    subject.settle()
    cpu_seconds = subject.cpu_seconds()
    result = run(seconds)
    return result, (subject.cpu_seconds() - cpu_seconds) * 1e3 / result.requests


def _footprint(model_dir: Path, payload: Payload) -> str:
    """Start and memory, of one process and of two workers."""
    with serving(model_dir) as subject:
        ready_seconds, fresh = subject.ready_seconds, subject.memory_mib("Rss")
        load.wrk(subject.url, payload, 16, LOADED_SECONDS)
        loaded, one = subject.memory_mib("Rss"), subject.memory_mib("Pss")
    with serving(model_dir, "--workers=2") as subject:
        load.wrk(subject.url, payload, 16, LOADED_SECONDS)
        supervisor, *workers = (memory_mib(process_id, "Pss") for process_id in subject.process_ids)
    two = sum(workers)
    return (
        f"ready {ready_seconds:.2f} s after exec; RSS {fresh:.0f} MiB, {loaded:.0f} after {LOADED_SECONDS:.0f} s of "
        f"load; PSS of two workers {two:.0f} MiB, {two / one:.2f} of one's {one:.0f}, and {supervisor:.0f} of their "
        "supervisor"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="NAME=DIR of an exported model; repeatable")
    parser.add_argument("--request", type=Path, default=Path("examples/input.json"), help="a V1 request with a picture")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a path's name, as in the table; repeatable")
    parser.add_argument("--plot", type=Path, default=Path("bench.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
