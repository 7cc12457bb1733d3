"""The metrics of a running server, read with Prometheus' own parser."""

from __future__ import annotations

from prometheus_client import parser

from tests.support.servers import Server
from tests.support.waiting import wait_for


def read_metrics(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample of `/metrics`, by its name and its sorted labels."""
    response = server.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def metric_value(server: Server, name: str, **labels: str) -> float:
    """Return the value of one sample."""
    return read_metrics(server)[name, tuple(sorted(labels.items()))]


def requests_by_outcome(server: Server) -> dict[tuple[str, str], float]:
    """Return the number of finished requests by protocol and outcome."""
    return {
        (dict(labels)["protocol"], dict(labels)["outcome"]): count
        for (name, labels), count in read_metrics(server).items()
        if name == "pinnace_requests_total"
    }


def wait_for_metric(server: Server, name: str, expected: float, **labels: str) -> None:
    """Wait until the sample has the expected value. Each look is a request, in which the event loop makes progress."""
    wait_for(lambda: metric_value(server, name, **labels) == expected, f"{name} to be {expected}")
