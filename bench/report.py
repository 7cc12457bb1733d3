"""Report of `python -m bench`: medians over the rounds, as a table and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.load import Result


@dataclass(frozen=True)
class Point:
    """One measurement of one round, with the in-process baseline of the same minutes.

    `name` is the payload's, with the server's configuration if it is not the default. `in_process_per_second` is
    images per second on all cores; `in_process_ms` is the time of a single image. `is_reference` says that the
    reference server was measured, not this one.
    """

    name: str
    connections: int
    result: Result
    cpu_ms_per_request: float
    in_process_per_second: float
    in_process_ms: float
    is_reference: bool = False

    @property
    def row_name(self) -> str:
        """Return the name of the row in the table of medians."""
        return f"{self.name}, reference server" if self.is_reference else self.name

    def __str__(self) -> str:
        return (
            f"{self.row_name}, {self.connections} connections: {self.result.per_second:.1f} requests/s, "
            f"in process {self.in_process_per_second:.1f} images/s"
        )


@dataclass(frozen=True)
class Row:
    """The medians of the same measurement over the rounds.

    `share_of_in_process` is requests per second over the in-process baseline's images per second, and `added_ms` is
    p50 less the in-process time of a single image; both are taken within a round.
    """

    name: str
    connections: int
    per_second: float
    share_of_in_process: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_request: float
    added_ms: float
    failed: int


def compute_medians(points: Sequence[Point]) -> list[Row]:
    """Return a row per name and number of connections, in the order of the points."""
    rows = []
    for name, connections in dict.fromkeys((point.row_name, point.connections) for point in points):
        same = [point for point in points if (point.row_name, point.connections) == (name, connections)]
        rows.append(
            Row(
                name,
                connections,
                median(point.result.per_second for point in same),
                median(point.result.per_second / point.in_process_per_second for point in same),
                median(point.result.p50_ms for point in same),
                median(point.result.p99_ms for point in same),
                median(point.cpu_ms_per_request for point in same),
                median(point.result.p50_ms - point.in_process_ms for point in same),
                sum(point.result.failed for point in same),
            )
        )
    return rows


@dataclass(frozen=True)
class Ratio:
    """This server's requests per second and CPU time per request over the reference server's, same payload and load.

    Ratios are taken within a round; `per_second` and `cpu_per_request` are medians over the rounds, and
    `min_per_second` and `max_per_second` are the extremes. `failed` counts the failed requests of both.
    """

    name: str
    connections: int
    per_second: float
    min_per_second: float
    max_per_second: float
    cpu_per_request: float
    failed: int


def compute_ratios(points: Sequence[Point]) -> list[Ratio]:
    """Return the ratios for every name and number of connections at which both servers were measured.

    `points` has the rounds in order.
    """
    ratios = []
    for name, connections in dict.fromkeys((point.name, point.connections) for point in points if point.is_reference):
        same = [point for point in points if (point.name, point.connections) == (name, connections)]
        ours, reference = ([point for point in same if point.is_reference is flag] for flag in (False, True))
        pairs = list(zip(ours, reference, strict=True))
        per_second = [own.result.per_second / other.result.per_second for own, other in pairs]
        cpu_per_request = median(own.cpu_ms_per_request / other.cpu_ms_per_request for own, other in pairs)
        failed = sum(point.result.failed for point in same)
        ratios.append(
            Ratio(name, connections, median(per_second), min(per_second), max(per_second), cpu_per_request, failed)
        )
    return ratios


def format_ratios(ratios: Sequence[Ratio]) -> str:
    """Return a Markdown table of this server over the reference server: above 1.00 in requests/s, this is faster."""
    lines = [
        "| payload | connections | requests/s, ratio | lowest to highest round | CPU per request, ratio | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ratio in ratios:
        lines.append(
            f"| {ratio.name} | {ratio.connections} | {ratio.per_second:.2f} | {ratio.min_per_second:.2f} to "
            f"{ratio.max_per_second:.2f} | {ratio.cpu_per_request:.2f} | {ratio.failed} |"
        )
    return "\n".join(lines)


def format_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table. The added time is shown for one connection only: with more, requests wait in turn."""
    lines = [
        "| payload | connections | requests/s | of in-process | p50 ms | p99 ms "
        "| CPU ms per request | added ms | failed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        added = f"{row.added_ms:.1f}" if row.connections == 1 else ""
        lines.append(
            f"| {row.name} | {row.connections} | {row.per_second:.1f} | {row.share_of_in_process:.2f} "
            f"| {row.p50_ms:.1f} | {row.p99_ms:.1f} | {row.cpu_ms_per_request:.1f} | {added} | {row.failed} |"
        )
    return "\n".join(lines)


def plot(rows: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Draw throughput against latency to `file`: a chart per model, a line per payload."""
    import matplotlib.pyplot as plt  # imported here: it takes a second, and is only needed at the end
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, len(rows), figsize=(6 * len(rows), 4.5), squeeze=False, sharey=True)
    for axis, (model, model_rows) in zip(axes[0], rows.items(), strict=True):
        for name in dict.fromkeys(row.name for row in model_rows):
            line = [row for row in model_rows if row.name == name]
            axis.plot([row.p50_ms for row in line], [row.per_second for row in line], marker="o", label=name)
        axis.set(title=Path(model).name, xlabel="p50 ms", xscale="log", ylabel="requests/s")
        axis.xaxis.set(major_locator=LogLocator(10, (1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(0)  # set last, for all charts: the axis is shared, and fixing it stops its autoscaling
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
