"""Throughput, latency and cost of the server, beside an in-process baseline on the same cores: `make bench`.

A machine's speed varies: the in-process baseline is measured before and after each point, and medians over the rounds
are printed.

BENCH_BASELINE="COMMAND URL [GRPC_HOST:PORT]" in the environment adds a reference server, such as the commit before.
Every payload is sent to it as well, right after this server; gRPC only if its gRPC address is given. The ratios of both
servers are printed in a table of their own.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from bench import load
from bench.baseline import InProcessBaseline
from bench.payloads import Payload, add_request_argument, make_payloads
from bench.report import Point, Row, compute_medians, compute_ratios, format_ratios, format_table, plot
from bench.server_process import ServerProcess, memory_mib, run_pinnace, run_server
from pinnace.cpus import available_cpus
from pinnace.runtimes.onnx import load_onnxruntime

REFERENCE_ENV = "BENCH_BASELINE"
CONNECTIONS = (1, 16, 64)
WARM_UP_SECONDS = 1.0
FOOTPRINT_LOAD_SECONDS = 20.0
FOOTPRINT_CONNECTIONS = 16


@dataclass(frozen=True)
class Reference:
    """Another server to measure: its command, its URL, and its gRPC address, which may be empty."""

    command: Sequence[str]
    url: str
    grpc_address: str


def parse_reference(text: str) -> Reference | None:
    """Return the reference server that BENCH_BASELINE describes, or None if it is empty. Raises SystemExit."""
    if not text:
        return None
    match shlex.split(text):
        case [_, *_, url, grpc_address] as words if _is_url(url) and re.fullmatch(r"[^/]+:\d+", grpc_address):
            return Reference(words[:-2], url, grpc_address)
        case [_, *_, url] as words if _is_url(url):
            return Reference(words[:-1], url, "")
    raise SystemExit(f'bench: {REFERENCE_ENV} must be "COMMAND URL [GRPC_HOST:PORT]", not "{text}"')


def _is_url(word: str) -> bool:
    return word.startswith(("http://", "https://"))


def main() -> None:
    """Measure each model, print its tables, and draw the chart of all."""
    arguments = _parse_arguments()
    arguments.reference = parse_reference(os.environ.get(REFERENCE_ENV, ""))
    _print(
        f"{_cpu_name()}, {available_cpus()} CPUs, shared by server and load; Python {platform.python_version()}, "
        f"ONNX Runtime {load_onnxruntime().__version__}. Request {arguments.request}; "
        f"median of {arguments.rounds} rounds of {arguments.seconds:g} s."
    )
    rows: dict[str, list[Row]] = {}
    for model in arguments.model:
        name, _, directory = model.rpartition("=")
        rows[name or directory] = _measure_model(name or directory, Path(directory), arguments)
    plot(rows, arguments.plot)
    _print(f"\nchart of throughput against latency: {arguments.plot}")


def _measure_model(name: str, model_dir: Path, arguments: argparse.Namespace) -> list[Row]:
    payloads = [
        payload for payload in make_payloads(arguments.request) if not arguments.only or payload.name in arguments.only
    ]
    points: list[Point] = []
    for number in range(1, arguments.rounds + 1):
        for point in _measure_round(model_dir, payloads, arguments):
            points.append(point)
            sys.stderr.write(f"{name}, round {number}: {point}\n")
    rows = compute_medians(points)
    images_per_second = median(point.in_process_per_second for point in points)
    image_ms = median(point.in_process_ms for point in points)
    _print(f"\n{name}: in process {images_per_second:.1f} images/s, a single image {image_ms:.1f} ms")
    _print(format_table(rows))
    if ratios := compute_ratios(points):
        _print(f"\n{name}: this server compared with the reference server\n{format_ratios(ratios)}\n")
    _print(_measure_footprint(model_dir, payloads[0]))
    return rows


def _measure_round(model_dir: Path, payloads: list[Payload], arguments: argparse.Namespace) -> Iterator[Point]:
    baseline = InProcessBaseline(model_dir, arguments.request, arguments.seconds)

    def measure(servers: Sequence[ServerProcess], payload: Payload, name: str) -> Iterator[Point]:
        for connections in CONNECTIONS:
            for number, server in enumerate(servers):
                result, cpu_ms_per_request = _measure_point(server, payload, connections, arguments.seconds)
                images_per_second, image_seconds = baseline.measure_again()
                yield Point(
                    name,
                    connections,
                    result,
                    cpu_ms_per_request,
                    images_per_second,
                    image_seconds * 1e3,
                    is_reference=number > 0,
                )

    with ExitStack() as stack:
        servers = [stack.enter_context(run_pinnace(model_dir))]
        if reference := arguments.reference:
            servers.append(stack.enter_context(run_server(reference.command, reference.url, reference.grpc_address)))
        for payload in payloads:
            accepting = [server for server in servers if payload.path or server.grpc_address]
            yield from measure(accepting, payload, payload.name)
    with run_pinnace(model_dir, f"--workers={available_cpus()}") as server:
        yield from measure([server], payloads[0], f"{payloads[0].name}, {available_cpus()} workers")
    if find_spec("ray"):
        with run_pinnace(model_dir, "--engine=ray", f"--num_replicas={available_cpus()}") as server:
            yield from measure([server], payloads[0], f"{payloads[0].name}, {available_cpus()} replicas on Ray")


def _measure_point(
    server: ServerProcess, payload: Payload, connections: int, seconds: float
) -> tuple[load.Result, float]:
    """Return the clients' result, and the server's CPU milliseconds per request."""

    def send(duration_seconds: float) -> load.Result:
        return load.send(server.url, server.grpc_address, payload, connections, duration_seconds)

    send(WARM_UP_SECONDS)
    server.wait_until_idle()
    cpu_seconds = server.cpu_seconds()
    result = send(seconds)
    if not result.requests:
        raise SystemExit(f"bench: {server.url} answered nothing in {seconds:g} s ({payload.name}): raise --seconds")
    return result, (server.cpu_seconds() - cpu_seconds) * 1e3 / result.requests


def _measure_footprint(model_dir: Path, payload: Payload) -> str:
    """Return a line with the time to ready, and the memory of one process and of two workers."""
    with run_pinnace(model_dir) as server:
        ready_seconds, initial_rss = server.ready_seconds, server.memory_mib("Rss")
        load.send_http(server.url, payload, FOOTPRINT_CONNECTIONS, FOOTPRINT_LOAD_SECONDS)
        loaded_rss, single_pss = server.memory_mib("Rss"), server.memory_mib("Pss")
    with run_pinnace(model_dir, "--workers=2") as server:
        load.send_http(server.url, payload, FOOTPRINT_CONNECTIONS, FOOTPRINT_LOAD_SECONDS)
        supervisor_pss, *worker_pss = (memory_mib(process_id, "Pss") for process_id in server.process_ids)
    both_pss = sum(worker_pss)
    return (
        f"ready {ready_seconds:.2f} s after exec; RSS {initial_rss:.0f} MiB, {loaded_rss:.0f} after "
        f"{FOOTPRINT_LOAD_SECONDS:.0f} s of load; PSS {single_pss:.0f} MiB; with two workers {both_pss:.0f} "
        f"({both_pss / single_pss:.2f} times as much) and {supervisor_pss:.0f} of the supervisor"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure the server's throughput, latency and cost on this machine."
    )
    parser.add_argument(
        "--model", action="append", required=True, help="NAME=DIR or DIR of an exported model; repeatable"
    )
    add_request_argument(parser)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="duration of each measurement in seconds (default 5)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds to take medians over (default 3)")
    parser.add_argument("--only", action="append", help="name of a payload to measure, as in the table; repeatable")
    parser.add_argument(
        "--plot", type=Path, default=Path("bench.png"), help="file to draw the chart to (default bench.png)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
