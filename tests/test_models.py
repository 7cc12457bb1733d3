"""pinnace/models.py: several models in one server, each on its own."""

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

from tests.conftest import grpc_call
from tests.pictures import PHOTOGRAPHS, v1_request
from tests.servers import Server, running, start_failing
from tests.test_grpc import image_request
from tests.test_metrics import metrics, value, wait_for

RUN = {"pinnace_batches_total", "pinnace_batch_rows_count"}
PICTURE = next(iter(PHOTOGRAPHS.values()))


def predictions(server: Server, model: str, *instances: Any) -> Any:
    """Of one V1 request; a status where it is not answered."""
    response = server.post(f"/v1/models/{model}:predict", json.dumps({"instances": instances}))
    return response.json().get("predictions", response.status_code)


@pytest.fixture(scope="module")
def several(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A classifier, a model without a directory, and one whose directory is empty."""
    empty = tmp_path_factory.mktemp("empty")
    models = f"--model=pictures={model_dir},echo=,broken={empty}"
    with running(models, "--predictor=echo=tests.predictors:Echo") as server:
        yield server


@contextmanager
def one_busy(gate: Callable[[str], Path], *flags: str) -> Iterator[Server]:
    """Two models, of which the one called slow is in a run."""
    held = gate("held")
    with (
        running("--model=slow=,quick=", "--predictor=tests.predictors:BatchSize", *flags) as server,
        ThreadPoolExecutor(1) as client,
    ):
        first = client.submit(predictions, server, "slow", str(held))
        with held.open("wb"):
            yield server
        assert first.result() == [1]


def test_each_model_answers_by_its_name_over_every_protocol(
    several: Server, server: Server, google: ModuleType
) -> None:
    alone = server.predict(v1_request(PICTURE)).json()["predictions"]
    with grpc.insecure_channel(several.grpc_address) as channel:
        request = image_request(google, PICTURE, model_name="pictures")
        row = grpc_call(channel, google, "ModelInfer", request).outputs[0].contents.fp32_contents

    assert several.get("/v2/models").json() == {"models": ["pictures", "echo", "broken"]}
    assert several.post("/v1/models/pictures:predict", v1_request(PICTURE)).json()["predictions"] == alone == [row]
    assert predictions(several, "echo", "a", "b") == ["a", "b"]
    assert predictions(several, "custom-model", "a") == 404


def test_a_model_that_cannot_be_loaded_leaves_the_others_serving_and_is_not_ready(several: Server) -> None:
    ready = {name: several.get(f"/v2/models/{name}/ready").status_code for name in ("pictures", "echo", "broken")}

    assert ready == {"pictures": 200, "echo": 200, "broken": 503}
    assert several.get("/v2/health/ready").status_code == 200
    assert predictions(several, "broken", "a") == 503
    assert value(several, "pinnace_model_ready", model_name="broken") == 0
    assert any("broken is NOT SERVED, the others are: " in line and "exactly one .onnx" in line for line in several.log)


def test_each_model_describes_itself(several: Server) -> None:
    metadata = [several.get(f"/v2/models/{name}").json() for name in ("pictures", "echo", "broken")]

    assert [len(model["outputs"]) for model in metadata] == [5, 0, 0]
    assert [model["platform"] for model in metadata] == ["onnxruntime_onnx", "", "onnxruntime_onnx"]


def test_the_metrics_tell_models_apart(several: Server) -> None:
    before = value(several, "pinnace_batch_rows_sum", model_name="echo")
    predictions(several, "echo", "a", "b", "c")

    assert value(several, "pinnace_batch_rows_sum", model_name="echo") - before == 3
    assert value(several, "pinnace_model_info", model_name="pictures", platform="onnxruntime_onnx") == 1


def test_a_directory_of_directories_is_a_model_for_each_that_holds_one(model_dir: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(model_dir)
    (tmp_path / "notes").mkdir()
    with running(f"--model_dir={tmp_path}") as server:
        assert server.get("/v1/models").json() == {"models": ["first", "second"]}
        assert len({json.dumps(server.post(f"/v1/models/{name}:predict", v1_request(PICTURE)).json())
                    for name in ("first", "second")}) == 1  # fmt: skip


def test_a_model_that_is_busy_holds_no_other_up(gate: Callable[[str], Path]) -> None:
    with one_busy(gate) as server:
        assert predictions(server, "quick", "a") == [1]


def test_a_model_at_its_limit_of_requests_leaves_the_others_theirs(gate: Callable[[str], Path]) -> None:
    with one_busy(gate, "--max_concurrent_requests=1") as server:
        assert predictions(server, "slow", "a") == 503
        assert predictions(server, "quick", "a") == [1]


def test_runs_that_take_every_core_take_turns(gate: Callable[[str], Path]) -> None:
    held, decoding = gate("held"), gate("decoding")
    models = ("--model=slow=,quick=", "--predictor=tests.predictors:EveryCore")
    with running(*models) as server, ThreadPoolExecutor(2) as clients:
        quick = clients.submit(predictions, server, "quick", f"@{decoding}")
        with decoding.open("wb"):
            slow = clients.submit(predictions, server, "slow", str(held))
            run = held.open("wb")
        with run:
            wait_for(lambda: value(server, "pinnace_requests_queued_or_running") == 2, server)
            for _ in range(20):
                assert {name for name, labels in metrics(server) if ("model_name", "quick") in labels}.isdisjoint(RUN)
        assert (quick.result(), slow.result()) == ([1], [1])


@pytest.mark.parametrize(
    ("flags", "code", "problem"),
    [
        (["--model=a=/no/such/folder,b=/nor/this"], 4, "pinnace: /no/such/folder, where a should be, does not exist"),
        (["--model=a=,a="], 2, "pinnace: --model names a twice"),
        (["--model=a"], 2, "pinnace: --model must be NAME=DIR, the name without slash, colon or blank, not a"),
        (["--model=a=", "--predictor=b=tests.predictors:Echo"], 2, "pinnace: --predictor names b, which is no model: "),
    ],
)
def test_a_start_with_no_model_left_ends_with_its_code_and_one_line(flags: list[str], code: int, problem: str) -> None:
    ended, lines = start_failing("--http_port=0", "--grpc_port=0", *flags)

    assert (ended, len(lines)) == (code, 1)
    assert lines[0].startswith(problem)
