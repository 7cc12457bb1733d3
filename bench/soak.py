"""Load of every kind for half an hour, and the server's memory all the while: `make soak`.

Memory that grows shows as a higher peak in the second half: every kind of load comes in both, and some take more.
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
from bench.payloads import payloads
from bench.subject import ServerProcess, serving

SLICE_SECONDS = 10.0
CONNECTIONS = (1, 16, 64)


@dataclass(frozen=True)
class Sample:
    """The server after a slice of load; `age_seconds` since the first began."""

    age_seconds: float
    rss_mib: float
    descriptors: int
    result: load.Result


def main() -> None:
    arguments = _arguments()
    with serving(arguments.model) as subject:
        samples = _samples(subject, arguments)
    sys.stdout.write(summary(samples) + "\n")
    plot(samples, arguments.plot)
    sys.stdout.write(f"memory and throughput over the time: {arguments.plot}\n")


def summary(samples: Sequence[Sample]) -> str:
    half = len(samples) // 2
    early, late = (max(one.rss_mib for one in part) for part in (samples[: half or 1], samples[half:]))
    requests, failed = sum(one.result.requests for one in samples), sum(one.result.failed for one in samples)
    first, last = samples[0], samples[-1]
    return (
        f"{last.age_seconds / 60:.0f} minutes, {requests} requests, {failed} failed. RSS {first.rss_mib:.0f} MiB after "
        f"the first {SLICE_SECONDS:.0f} s, at most {early:.0f} in the first half and {late:.0f} in the second. "
        f"Open descriptors {first.descriptors}, at the end {last.descriptors}."
    )


def plot(samples: Sequence[Sample], file: Path) -> None:
    import matplotlib.pyplot as plt  # a second to load, and only at the end

    figure, memory = plt.subplots(figsize=(8, 4))
    minutes = [one.age_seconds / 60 for one in samples]
    memory.plot(minutes, [one.rss_mib for one in samples], label="RSS, MiB")
    memory.plot(minutes, [one.result.per_second for one in samples], ".", label="requests/s")
    memory.set(xlabel="minutes of load, every kind in turn", ylim=(0, None))
    memory.grid(alpha=0.3)
    memory.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _samples(subject: ServerProcess, arguments: argparse.Namespace) -> list[Sample]:
    """Every payload at every number of connections, a slice each, over and over until the time is over."""
    kinds = [(payload, connections) for connections in CONNECTIONS for payload in payloads(arguments.request)]
    samples: list[Sample] = []
    started_at = time.monotonic()
    for payload, connections in cycle(kinds):
        result = load.send(subject.url, subject.grpc_address, payload, connections, SLICE_SECONDS)
        subject.settle()
        age_seconds = time.monotonic() - started_at
        samples.append(Sample(age_seconds, subject.memory_mib("Rss"), subject.descriptors(), result))
        sys.stderr.write(
            f"{age_seconds / 60:5.1f} min  {samples[-1].rss_mib:.0f} MiB  {samples[-1].descriptors} descriptors  "
            f"{payload.name}, {connections} connections: {result.per_second:.1f}/s, {result.failed} failed\n"
        )
        if age_seconds > arguments.minutes * 60:
            break
    return samples


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("model"), help="directory of an exported model")
    parser.add_argument("--request", type=Path, default=Path("examples/input.json"), help="a V1 request with a picture")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--plot", type=Path, default=Path("soak.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
