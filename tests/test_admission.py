"""pinnace/inference/admission.py: requests beyond a limit are refused at once, with the time after which to retry."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import pytest

from tests.support.clients import call_grpc, infer_over_grpc, make_image_request, predict_over_rest
from tests.support.metrics import metric_value, requests_by_outcome, wait_for_metric
from tests.support.servers import read_until, run_gated_server, run_server
from tests.support.waiting import wait_for

ECHO = "--predictor=tests.support.predictors:Echo"
SIZES = "--predictor=tests.support.predictors:BatchSize"


def make_refusal(limit: str) -> dict[str, str]:
    """Return the JSON of a refusal at a limit."""
    return {"error": f"The server is at its limit of {limit}; try again."}


def test_a_request_beyond_max_concurrent_requests_is_refused_at_once_with_retry_after(
    tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    only = make_gate("only")
    with run_gated_server(tmp_path, "--max_concurrent_requests=1") as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(predict_over_rest, server, "only")
        with only.open("wb"):
            refused = predict_over_rest(server, "another")
            with pytest.raises(grpc.RpcError) as error:
                infer_over_grpc(server, google, "another")
        assert answer.result().status_code == 200

    text = make_refusal("requests (max_concurrent_requests)")
    assert (refused.status_code, refused.json(), refused.headers["retry-after"]) == (503, text, "1")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error.value.details() == text["error"]


def test_a_refusal_does_not_wait_for_the_body(tmp_path: Path, make_gate: Callable[[str], Path]) -> None:
    only = make_gate("only")
    with (
        run_gated_server(tmp_path, "--max_concurrent_requests=1") as server,
        ThreadPoolExecutor() as clients,
        server.connect() as connection,
    ):
        answer = clients.submit(predict_over_rest, server, "only")
        with only.open("wb"):
            connection.sendall(
                b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
            )
            assert read_until(connection, b'try again."}').startswith(b"HTTP/1.1 503 ")
        assert answer.result().status_code == 200


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
def test_retry_after_is_the_time_that_the_requests_in_flight_need(
    port: str, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [make_gate("first"), make_gate("second")]
    num_answered = num_in_flight = 2
    with (
        run_server(
            "--predictor=tests.support.predictors:Slow", "--max_concurrent_requests=2", "--max_batch_size=1"
        ) as server,
        ThreadPoolExecutor() as clients,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port if port == 'gRPC port' else server.http_port}") as channel,
    ):
        started_at = time.monotonic()
        for _ in range(num_answered):
            assert server.predict('{"instances": ["0.7"]}').status_code == 200
        answers = [clients.submit(server.predict, json.dumps({"instances": [str(gate)]})) for gate in gates]
        wait_for_metric(server, "pinnace_requests_in_flight", 2)

        refused = server.predict('{"instances": ["0"]}')
        with pytest.raises(grpc.RpcError) as error:
            call_grpc(channel, google, "ModelInfer", make_image_request(google, b"0"))
        most_seconds = num_in_flight * (time.monotonic() - started_at) / num_answered
        for gate in gates:
            clients.submit(gate.write_bytes, b"")
        assert [answer.result().status_code for answer in answers] == [200, 200]

    least_seconds = num_in_flight * 0.7
    assert refused.status_code == 503
    assert math.ceil(least_seconds) <= int(refused.headers["retry-after"]) <= math.ceil(most_seconds)
    trailers = {entry.key: entry.value for entry in error.value.trailing_metadata()}
    assert least_seconds * 1000 <= int(trailers["grpc-retry-pushback-ms"]) <= most_seconds * 1000 + 1


def test_rows_are_limited_as_well_as_requests(make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    with run_server(SIZES, "--max_queue_rows=3") as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(server.predict, json.dumps({"instances": [str(held), "a", "b"]}))
        with held.open("wb"):
            refused = server.predict('{"instances": ["c"]}')
            assert (refused.status_code, refused.json()) == (503, make_refusal("rows (max_queue_rows)"))
        assert answer.result().json() == {"predictions": [3, 3, 3]}
        assert server.predict('{"instances": ["c"]}').json() == {"predictions": [1]}


def test_rows_are_counted_once_for_a_model_with_several_inputs() -> None:
    def send_rows(rows: int) -> Any:
        inputs = [
            {"name": name, "datatype": "INT64", "shape": [rows], "data": [1] * rows} for name in ("left", "right")
        ]
        response = server.post("/v2/models/custom-model/infer", json.dumps({"inputs": inputs}))
        return response.json().get("outputs", [{"data": response.status_code}])[0]["data"]

    with run_server("--predictor=tests.support.predictors:Sum", "--max_instances=3", "--max_queue_rows=3") as server:
        assert send_rows(3) == [2, 2, 2]
        assert send_rows(4) == 413


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
def test_bodies_and_messages_together_take_no_more_memory_than_max_queue_bytes(
    port: str, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    held, size = make_gate("held"), 600_000
    body = json.dumps({"instances": [str(held)]}).ljust(size)
    with run_server(SIZES, "--max_queue_bytes=1000000") as server, ThreadPoolExecutor() as clients:
        target = f"127.0.0.1:{server.grpc_port if port == 'gRPC port' else server.http_port}"
        with grpc.insecure_channel(target) as channel:
            answer = clients.submit(server.predict, body)
            with held.open("wb"):
                refused = server.predict(" " * size)
                assert (refused.status_code, refused.json()) == (503, make_refusal("bytes (max_queue_bytes)"))
                with pytest.raises(grpc.RpcError, match="max_queue_bytes") as error:
                    call_grpc(channel, google, "ModelInfer", make_image_request(google, b" " * size))
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                assert server.predict("[]".ljust(100_000)).status_code == 400
            assert answer.result().status_code == 200
            message = make_image_request(google, b"a".ljust(400_000))
            assert call_grpc(channel, google, "ModelInfer", message).outputs[0].contents.int64_contents == [1]


def test_memory_of_an_incomplete_body_is_released_when_its_client_disconnects() -> None:
    head = b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 700000\r\n\r\n"
    with run_server(ECHO, "--max_queue_bytes=1000000") as server:
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(head + b" " * 600_000)
                wait_for(lambda: server.predict(" " * 600_000).status_code == 503, "a refusal")
            wait_for(lambda: server.predict("[]".ljust(600_000)).status_code == 400, "released memory")


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("http2", [False, True])
def test_a_request_leaves_the_queue_when_its_client_disconnects(
    version: str, http2: bool, make_gate: Callable[[str], Path]
) -> None:
    path, body = {
        "v1": ("/v1/models/custom-model:predict", '{"instances": ["a"]}'),
        "v2": (
            "/v2/models/custom-model/infer",
            '{"inputs": [{"name": "a", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}',
        ),
    }[version]
    held = make_gate("held")
    with run_server(SIZES) as server, ThreadPoolExecutor() as clients:
        first = clients.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            with (
                httpx.Client(base_url=server.url, http1=not http2, http2=http2, timeout=0.3) as leaving,
                pytest.raises(httpx.ReadTimeout),
            ):
                leaving.post(path, content=body)
            wait_for(lambda: requests_by_outcome(server).get((version, "cancelled")) == 1, "a cancelled request")
            assert metric_value(server, "pinnace_requests_in_flight") == 1
            behind = clients.submit(server.predict, '{"instances": ["b"]}')
            wait_for_metric(server, "pinnace_requests_queued_or_running", 2)
        assert first.result().json() == {"predictions": [1]}
        assert behind.result().json() == {"predictions": [1]}
        assert metric_value(server, "pinnace_dropped_requests_total", model_name="custom-model") == 1
