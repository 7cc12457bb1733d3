"""pinnace/dataplane.py: a request that would take too long."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import grpc
import pytest

from tests.conftest import grpc_call
from tests.servers import Server, running
from tests.test_grpc import image_request
from tests.test_metrics import ended, value

TEXT = "The request was not answered within request_timeout_seconds (1); try again."


@contextmanager
def busy(gate: Callable[[str], Path]) -> Iterator[Server]:
    """A server with a second for each request, while its model is in a run that takes longer."""
    held = gate("held")
    with (
        running("--predictor=tests.predictors:BatchSize", "--request_timeout_seconds=1") as server,
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
def test_a_request_that_is_late_is_answered_so_and_given_up(
    path: str, body: object, gate: Callable[[str], Path]
) -> None:
    with busy(gate) as server:
        late = server.post(path, json.dumps(body))

        assert (late.status_code, late.json(), "retry-after" in late.headers) == (504, {"error": TEXT}, True)


def test_a_call_that_is_late_is_answered_so_and_counted(gate: Callable[[str], Path], google: ModuleType) -> None:
    with busy(gate) as server:
        with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as error:
            grpc_call(channel, google, "ModelInfer", image_request(google, b"a"))
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.value.details() == TEXT
        assert ended(server)["grpc", "timeout"] == 1


def test_what_was_late_is_not_run_and_the_model_goes_on(gate: Callable[[str], Path]) -> None:
    held = gate("held")
    with (
        running("--predictor=tests.predictors:BatchSize", "--request_timeout_seconds=1") as server,
        ThreadPoolExecutor(1) as client,
    ):
        first = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            assert server.predict('{"instances": ["a"]}').status_code == 504
            assert first.result().status_code == 504
        assert server.predict('{"instances": ["b"]}').json() == {"predictions": [1]}
        assert value(server, "pinnace_dropped_requests_total", model_name="custom-model") == 1
        assert value(server, "pinnace_batch_rows_sum", model_name="custom-model") == 2
