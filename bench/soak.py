"""Soak test: every payload in turn for half an hour, and the server's memory after each: `make soak`.

A leak shows as a higher peak in the second half: both halves have every kind of load, and some need more memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from bench import load
from bench.payloads import add_request_argument, make_payloads
from bench.server_process import ServerProcess, run_pinnace

SLICE_SECONDS = 10.0
CONNECTIONS = (1, 16, 64)


@dataclass(frozen=True)
class Sample:
    """The server after a slice of load. `elapsed_seconds` is the time since the first slice began."""

    elapsed_seconds: float
    rss_mib: float
    descriptors: int
    result: load.Result


def main() -> None:
    """Run the soak test, print its summary and draw its chart."""
    arguments = _parse_arguments()
    with run_pinnace(arguments.model) as server:
        samples = _collect_samples(server, arguments)
    sys.stdout.write(summarize(samples) + "\n")
    plot(samples, arguments.plot)
    sys.stdout.write(f"chart of memory and throughput over time: {arguments.plot}\n")


def summarize(samples: Sequence[Sample]) -> str:
    """Return the summary that is printed: failed requests, and memory and descriptors at the start and later."""
    half = len(samples) // 2
    first_half, second_half = samples[: half or 1], samples[half:]
    first_peak, second_peak = (max(sample.rss_mib for sample in part) for part in (first_half, second_half))
    requests = sum(sample.result.requests for sample in samples)
    failed = sum(sample.result.failed for sample in samples)
    first, last = samples[0], samples[-1]
    return (
        f"{last.elapsed_seconds / 60:.0f} minutes, {requests} requests, {failed} failed. RSS {first.rss_mib:.0f} MiB "
        f"after the first {SLICE_SECONDS:.0f} s, at most {first_peak:.0f} in the first half and {second_peak:.0f} in "
        f"the second. Open descriptors {first.descriptors}, at the end {last.descriptors}."
    )


def plot(samples: Sequence[Sample], file: Path) -> None:
    """Draw memory and throughput over time to `file`."""
    import matplotlib.pyplot as plt  # imported here: it takes a second, and is only needed at the end

    figure, axis = plt.subplots(figsize=(8, 4))
    minutes = [sample.elapsed_seconds / 60 for sample in samples]
    axis.plot(minutes, [sample.rss_mib for sample in samples], label="RSS, MiB")
    axis.plot(minutes, [sample.result.per_second for sample in samples], ".", label="requests/s")
    axis.set(xlabel="minutes of load, every payload in turn", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _collect_samples(server: ServerProcess, arguments: argparse.Namespace) -> list[Sample]:
    """Send every payload over every number of connections, a slice each, repeatedly until the time is over."""
    kinds = [(payload, connections) for connections in CONNECTIONS for payload in make_payloads(arguments.request)]
    samples: list[Sample] = []
    started_at = time.monotonic()
    for payload, connections in cycle(kinds):
        result = load.send(server.url, server.grpc_address, payload, connections, SLICE_SECONDS)
        server.wait_until_idle()
        elapsed_seconds = time.monotonic() - started_at
        samples.append(Sample(elapsed_seconds, server.memory_mib("Rss"), server.count_descriptors(), result))
        sys.stderr.write(
            f"{elapsed_seconds / 60:5.1f} min  {samples[-1].rss_mib:.0f} MiB  {samples[-1].descriptors} descriptors  "
            f"{payload.name}, {connections} connections: {result.per_second:.1f} requests/s, {result.failed} failed\n"
        )
        if elapsed_seconds > arguments.minutes * 60:
            break
    return samples


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description="Load the server for half an hour, and watch its memory."
    )
    parser.add_argument(
        "--model", type=Path, default=Path("model"), help="directory of an exported model (default model)"
    )
    add_request_argument(parser)
    parser.add_argument("--minutes", type=float, default=30.0, help="duration in minutes (default 30)")
    parser.add_argument(
        "--plot", type=Path, default=Path("soak.png"), help="file to draw the chart to (default soak.png)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
