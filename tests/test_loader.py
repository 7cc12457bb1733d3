"""pinnace/models/loader.py: several independent models in one server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from tests.support.clients import call_grpc, make_image_request, make_v1_request
from tests.support.metrics import metric_value, read_metrics, wait_for_metric
from tests.support.pictures import PHOTOGRAPHS
from tests.support.servers import Server, expect_start_failure, run_server

RUN = {"pinnace_batches_total", "pinnace_batch_rows_count"}
PICTURE = next(iter(PHOTOGRAPHS.values()))


def predict(server: Server, model: str, *instances: Any) -> Any:
    """Send one V1 request, and return its predictions, or the status of an error."""
    response = server.post(f"/v1/models/{model}:predict", json.dumps({"instances": instances}))
    return response.json().get("predictions", response.status_code)


@pytest.fixture(scope="module")
def several(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a classifier, a model without a directory, and a model whose directory is empty."""
    empty = tmp_path_factory.mktemp("empty")
    models = f"--model=pictures={model_dir},echo=,broken={empty}"
    with run_server(models, "--predictor=echo=tests.support.predictors:Echo") as server:
        yield server


@contextmanager
def run_with_busy_model(make_gate: Callable[[str], Path], *flags: str) -> Iterator[Server]:
    """Serve the models slow and quick, and hold slow in a run."""
    held = make_gate("held")
    with (
        run_server("--model=slow=,quick=", "--predictor=tests.support.predictors:BatchSize", *flags) as server,
        ThreadPoolExecutor(1) as client,
    ):
        first = client.submit(predict, server, "slow", str(held))
        with held.open("wb"):
            yield server
        assert first.result() == [1]


def test_each_model_is_served_by_its_name_over_every_protocol(
    several: Server, server: Server, google: ModuleType
) -> None:
    alone = server.predict(make_v1_request(PICTURE)).json()["predictions"]
    with grpc.insecure_channel(several.grpc_address) as channel:
        request = make_image_request(google, PICTURE, model_name="pictures")
        row = call_grpc(channel, google, "ModelInfer", request).outputs[0].contents.fp32_contents

    assert several.get("/v2/models").json() == {"models": ["pictures", "echo", "broken"]}
    assert several.post("/v1/models/pictures:predict", make_v1_request(PICTURE)).json()["predictions"] == alone == [row]
    assert predict(several, "echo", "a", "b") == ["a", "b"]
    assert predict(several, "custom-model", "a") == 404


def test_a_model_that_cannot_be_loaded_is_not_ready_and_the_others_are_served(several: Server) -> None:
    ready = {name: several.get(f"/v2/models/{name}/ready").status_code for name in ("pictures", "echo", "broken")}

    assert ready == {"pictures": 200, "echo": 200, "broken": 503}
    assert several.get("/v2/health/ready").status_code == 200
    assert predict(several, "broken", "a") == 503
    assert metric_value(several, "pinnace_model_ready", model_name="broken") == 0
    assert any(
        "broken failed to load and is NOT SERVED; the other models are served: " in line and "exactly one .onnx" in line
        for line in several.log
    )


def test_each_model_has_its_own_metadata(several: Server) -> None:
    metadata = [several.get(f"/v2/models/{name}").json() for name in ("pictures", "echo", "broken")]

    assert [len(model["outputs"]) for model in metadata] == [5, 0, 0]
    assert [model["platform"] for model in metadata] == ["onnxruntime_onnx", "", "onnxruntime_onnx"]


def test_metrics_have_the_model_as_a_label(several: Server) -> None:
    predict(several, "echo", "a")  # a model has no rows in the metrics before its first run
    before = metric_value(several, "pinnace_batch_rows_sum", model_name="echo")
    predict(several, "echo", "a", "b", "c")

    assert metric_value(several, "pinnace_batch_rows_sum", model_name="echo") - before == 3
    assert metric_value(several, "pinnace_model_info", model_name="pictures", platform="onnxruntime_onnx") == 1


def test_each_subdirectory_with_a_model_is_served(model_dir: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(model_dir)
    (tmp_path / "notes").mkdir()
    with run_server(f"--model_dir={tmp_path}") as server:
        assert server.get("/v1/models").json() == {"models": ["first", "second"]}
        assert len({json.dumps(server.post(f"/v1/models/{name}:predict", make_v1_request(PICTURE)).json())
                    for name in ("first", "second")}) == 1  # fmt: skip


def test_a_busy_model_does_not_delay_another(make_gate: Callable[[str], Path]) -> None:
    with run_with_busy_model(make_gate) as server:
        assert predict(server, "quick", "a") == [1]


def test_each_model_has_its_own_limit_of_requests(make_gate: Callable[[str], Path]) -> None:
    with run_with_busy_model(make_gate, "--max_concurrent_requests=1") as server:
        assert predict(server, "slow", "a") == 503
        assert predict(server, "quick", "a") == [1]


def test_runs_that_use_all_cores_take_turns(make_gate: Callable[[str], Path]) -> None:
    held, decoding = make_gate("held"), make_gate("decoding")
    models = ("--model=slow=,quick=", "--predictor=tests.support.predictors:AllCores")
    with run_server(*models) as server, ThreadPoolExecutor(2) as clients:
        quick = clients.submit(predict, server, "quick", f"@{decoding}")
        with decoding.open("wb"):
            slow = clients.submit(predict, server, "slow", str(held))
            run = held.open("wb")
        with run:
            wait_for_metric(server, "pinnace_requests_queued_or_running", 2)
            for _ in range(20):
                assert {name for name, labels in read_metrics(server) if ("model_name", "quick") in labels}.isdisjoint(
                    RUN
                )
        assert (quick.result(), slow.result()) == ([1], [1])


@pytest.mark.parametrize(
    ("flags", "code", "problem"),
    [
        (["--model=a=/no/such/folder,b=/nor/this"], 4, "pinnace: the path of a, /no/such/folder, does not exist"),
        (["--model=a=,a="], 2, "pinnace: --model names a twice"),
        (["--model=a"], 2, "pinnace: --model must be NAME=DIR, the name without slash, colon or blank, not a"),
        (
            ["--model=a=", "--predictor=b=tests.support.predictors:Echo"],
            2,
            "pinnace: --predictor names b, which is not a model: ",
        ),
    ],
)
def test_a_start_without_any_model_fails_with_its_exit_code_and_one_line(
    flags: list[str], code: int, problem: str
) -> None:
    exit_code, lines = expect_start_failure("--http_port=0", "--grpc_port=0", *flags)

    assert (exit_code, len(lines)) == (code, 1)
    assert lines[0].startswith(problem)
