"""What was measured, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.load import Result


@dataclass(frozen=True)
class Point:
    """One path at one number of connections in one round. `limit` is in images a second, `alone_ms` for one image."""

    name: str
    connections: int
    result: Result
    cpu_ms: float
    baseline: float
    alone_ms: float

    def __str__(self) -> str:
        return f"{self.name}, {self.connections} connections: {self.result.per_second:.1f}/s of {self.baseline:.1f}"


@dataclass(frozen=True)
class Row:
    """The median over the rounds."""

    name: str
    connections: int
    per_second: float
    of_limit: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    added_ms: float
    failed: int


def medians(points: Sequence[Point]) -> list[Row]:
    rows = []
    for name, connections in dict.fromkeys((point.name, point.connections) for point in points):
        same = [point for point in points if (point.name, point.connections) == (name, connections)]
        rows.append(
            Row(
                name,
                connections,
                median(point.result.per_second for point in same),
                median(point.result.per_second / point.baseline for point in same),
                median(point.result.p50_ms for point in same),
                median(point.result.p99_ms for point in same),
                median(point.cpu_ms for point in same),
                median(point.result.p50_ms - point.alone_ms for point in same),
                sum(point.result.failed for point in same),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| path | connections | requests/s | of the limit | p50 ms | p99 ms | CPU ms a request | added ms | failed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        added = f"{row.added_ms:.1f}" if row.connections == 1 else ""
        lines.append(
            f"| {row.name} | {row.connections} | {row.per_second:.1f} | {row.of_limit:.2f} | {row.p50_ms:.1f} "
            f"| {row.p99_ms:.1f} | {row.cpu_ms:.1f} | {added} | {row.failed} |"
        )
    return "\n".join(lines)


def plot(rows: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Throughput against latency: a picture a model, a line a path."""
    import matplotlib.pyplot as plt  # a second to load, and only at the end
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, len(rows), figsize=(6 * len(rows), 4.5), squeeze=False, sharey=True)
    for axis, (model, measured) in zip(axes[0], rows.items(), strict=True):
        for name in dict.fromkeys(row.name for row in measured):
            line = [row for row in measured if row.name == name]
            axis.plot([row.p50_ms for row in line], [row.per_second for row in line], marker="o", label=name)
        axis.set(title=Path(model).name, xlabel="p50 ms", xscale="log", ylabel="requests/s")
        axis.xaxis.set(major_locator=LogLocator(10, (1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(0)  # of all: they share it, and each may only raise it until here
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
