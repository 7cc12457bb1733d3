"""pinnace/observability/metrics.py: the values of /metrics after real requests, read with Prometheus' parsers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.clients import call_grpc, infer_over_grpc, make_image_request, make_v1_request, predict_over_rest
from tests.support.metrics import metric_value, read_metrics, requests_by_outcome
from tests.support.pictures import CAT
from tests.support.servers import Server, run_gated_server, run_server
from tests.support.waiting import wait_for

KSERVES_BUCKETS = "0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, +Inf"
FAILING = "--predictor=tests.support.predictors:Failing"


def test_kserves_histograms_have_their_names_labels_and_buckets(model_dir: Path) -> None:
    with run_server(f"--model_dir={model_dir}") as server:
        for _ in range(3):
            assert server.predict(make_v1_request(CAT)).status_code == 200
        samples = read_metrics(server)

    model = ("model_name", "custom-model")
    for name in ("preprocess", "predict", "postprocess"):
        assert samples[f"request_{name}_seconds_count", (model,)] == 3
        bounds = [dict(labels)["le"] for key, labels in samples if key == f"request_{name}_seconds_bucket"]
        assert ", ".join(bounds) == KSERVES_BUCKETS
    assert samples["request_predict_seconds_sum", (model,)] > 0
    assert samples["pinnace_model_info", (model, ("platform", "onnxruntime_onnx"))] == 1
    assert samples["pinnace_batch_rows_count", (model,)] == 3
    for stage in ("read", "decode_queue", "decode", "queue", "infer", "encode"):
        assert samples["pinnace_stage_seconds_count", (("stage", stage),)] == 3


def test_requests_are_counted_by_protocol_and_outcome(google: ModuleType) -> None:
    with run_server(FAILING) as server, grpc.insecure_channel(server.grpc_address) as channel:
        for error in ("InvalidInput", "TooLarge", "Overloaded", "ModelNotReady", "RuntimeError"):
            predict_over_rest(server, error)
            with pytest.raises(grpc.RpcError):
                infer_over_grpc(server, google, error)
        server.predict("{")
        server.post("/v1/models/nope:predict", "{}")
        server.predict("<x/>", content_type="application/xml")
        server.post("/v2/models/custom-model/infer", "{}")
        with pytest.raises(grpc.RpcError):
            call_grpc(channel, google, "ModelInfer", make_image_request(google, CAT, model_name="nope"))

        assert requests_by_outcome(server) == {
            ("v1", "invalid"): 5,
            ("v1", "rejected"): 2,
            ("v1", "failed"): 1,
            ("v2", "invalid"): 1,
            ("grpc", "invalid"): 3,
            ("grpc", "rejected"): 2,
            ("grpc", "failed"): 1,
        }


def test_answered_requests_are_counted_with_their_bytes(google: ModuleType) -> None:
    body = json.dumps({"instances": ["a", "b"]})
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        answer = server.predict(body)
        infer_over_grpc(server, google, "a")

        assert requests_by_outcome(server) == {("v1", "answered"): 1, ("grpc", "answered"): 1}
        assert metric_value(server, "pinnace_received_bytes_total", protocol="v1") == len(body)
        assert metric_value(server, "pinnace_sent_bytes_total", protocol="v1") == len(answer.content)
        assert metric_value(server, "pinnace_received_bytes_total", protocol="grpc") > 0


def test_a_call_that_its_client_cancels_is_counted_as_cancelled(
    tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path) as server, grpc.insecure_channel(server.grpc_address) as channel:
        request = make_image_request(google, b"held").SerializeToString()
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        call_in_flight = call.future(request, timeout=60)
        with held.open("wb"):
            call_in_flight.cancel()
            wait_for(lambda: requests_by_outcome(server) == {("grpc", "cancelled"): 1}, "one cancelled call")


def test_a_client_that_disconnects_in_the_middle_of_its_body_is_counted_as_cancelled() -> None:
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        with server.connect() as connection:
            connection.sendall(
                b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
            )

        wait_for(lambda: requests_by_outcome(server) == {("v1", "cancelled"): 1}, "one cancelled request")


def test_requests_in_flight_are_measured(tmp_path: Path, make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path, predictor="GatedPredict") as server, ThreadPoolExecutor() as clients:
        assert metric_value(server, "pinnace_requests_in_flight") == 0
        answer = clients.submit(predict_over_rest, server, "held")
        with held.open("wb"):
            assert metric_value(server, "pinnace_requests_in_flight") == 1
            assert metric_value(server, "pinnace_requests_queued_or_running") == 1
        assert answer.result().status_code == 200
        assert metric_value(server, "pinnace_requests_in_flight") == 0


def test_the_size_of_a_batch_is_its_number_of_rows() -> None:
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        server.predict(json.dumps({"instances": [1, 2, 3]}))

        assert metric_value(server, "pinnace_batch_rows_sum", model_name="custom-model") == 3


def test_openmetrics_is_returned_to_a_client_that_accepts_it(server: Server) -> None:
    accept = "application/openmetrics-text; version=1.0.0; escaping=underscores"
    response = httpx.get(f"{server.url}/metrics", headers={"accept": accept})

    assert response.headers["content-type"] == (
        "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
    )
    names = {family.name for family in text_string_to_metric_families(response.text)}  # type: ignore[no-untyped-call]
    assert {"request_predict_seconds", "pinnace_requests", "process_resident_memory_bytes", "python_info"} <= names


def test_the_memory_of_the_process_is_measured(server: Server) -> None:
    resident = metric_value(server, "process_resident_memory_bytes")

    statm: Any = Path(f"/proc/{server.process.pid}/statm").read_text().split()
    assert resident == pytest.approx(int(statm[1]) * os.sysconf("SC_PAGE_SIZE"), rel=0.2)
