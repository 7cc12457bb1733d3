"""pinnace/inference/dataplane.py: requests that take longer than request_timeout_seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import grpc
import pytest

from tests.support.clients import call_grpc, make_image_request
from tests.support.metrics import metric_value, requests_by_outcome
from tests.support.servers import Server, run_server

TEXT = "The request was not answered within request_timeout_seconds (1); try again."


@contextmanager
def run_busy_server(make_gate: Callable[[str], Path]) -> Iterator[Server]:
    """Run a server with a timeout of 1 s per request, and hold its model in a run that takes longer."""
    held = make_gate("held")
    with (
        run_server("--predictor=tests.support.predictors:BatchSize", "--request_timeout_seconds=1") as server,
        ThreadPoolExecutor(1) as client,
    ):
        first = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            yield server
            assert first.result().status_code == 504


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/custom-model:predict", {"instances": ["a"]}),
        (
            "/v2/models/custom-model/infer",
            {"inputs": [{"name": "a", "datatype": "INT64", "shape": [1], "data": [1]}]},
        ),
    ],
)
def test_a_request_that_takes_too_long_gets_504_with_retry_after(
    path: str, body: object, make_gate: Callable[[str], Path]
) -> None:
    with run_busy_server(make_gate) as server:
        late = server.post(path, json.dumps(body))

        assert (late.status_code, late.json(), "retry-after" in late.headers) == (504, {"error": TEXT}, True)


def test_a_call_that_takes_too_long_gets_deadline_exceeded_and_is_counted(
    make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    with run_busy_server(make_gate) as server:
        with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as error:
            call_grpc(channel, google, "ModelInfer", make_image_request(google, b"a"))
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.value.details() == TEXT
        assert requests_by_outcome(server)["grpc", "timeout"] == 1


def test_a_request_that_timed_out_in_the_queue_is_not_run(make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    with (
        run_server("--predictor=tests.support.predictors:BatchSize", "--request_timeout_seconds=1") as server,
        ThreadPoolExecutor(1) as client,
    ):
        first = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            assert server.predict('{"instances": ["a"]}').status_code == 504
            assert first.result().status_code == 504
        assert server.predict('{"instances": ["b"]}').json() == {"predictions": [1]}
        assert metric_value(server, "pinnace_dropped_requests_total", model_name="custom-model") == 1
        assert metric_value(server, "pinnace_batch_rows_sum", model_name="custom-model") == 2


def test_a_server_whose_model_is_stuck_is_not_ready_until_it_is_free(make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    with (
        run_server("--predictor=tests.support.predictors:BatchSize", "--request_timeout_seconds=1") as server,
        ThreadPoolExecutor(1) as client,
    ):
        late = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            server.wait_for_line(re.compile("not ready: every thread that decodes, or a run of a model"))
            assert server.get("/v2/health/ready").status_code == 503
            assert server.get("/v2/health/live").status_code == 200
        server.wait_for_line(re.compile("ready again: worker threads are free"))
        assert server.get("/v2/health/ready").status_code == 200
        assert late.result().status_code == 504
