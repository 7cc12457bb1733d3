"""pinnace/ray_engine.py: the same answers from replicas of Ray Serve, side by side, and what becomes of lost ones."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from tests.conftest import grpc_call
from tests.pictures import PHOTOGRAPHS, v1_request
from tests.servers import PROJECT, Server, is_alive, running, start_failing, wait_for
from tests.test_grpc import image_request, tensor_request
from tests.test_metrics import value

RAY = ("--engine=ray", '--ray_actor_options={"num_cpus": 0.5}')
BACK_SECONDS = 30
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
PICTURES = list(PHOTOGRAPHS.values())


def replicas(ancestor: subprocess.Popen[Any], model: str = "custom-model") -> set[int]:
    """The processes of a model's replicas."""
    return below(ancestor, "-f", f"^ray::ServeReplica:{model}:")


def below(ancestor: subprocess.Popen[Any], *pattern: str) -> set[int]:
    found = subprocess.run(["pgrep", *pattern], capture_output=True, text=True, check=False).stdout.split()
    return {int(process) for process in found if is_alive(int(process)) and is_below(int(process), ancestor.pid)}


def is_below(process: int, ancestor: int) -> bool:
    """A replica is Ray's child, and Ray is its starter's."""
    while process > 1 and process != ancestor:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process == ancestor


@pytest.fixture(scope="module")
def on_ray(model_dir: Path) -> Iterator[Server]:
    """Two replicas of one model, and another model beside it."""
    models = f"--model=custom-model={model_dir},failing="
    with running(*RAY, "--num_replicas=2", models, "--predictor=failing=tests.predictors:Failing") as server:
        yield server
        assert server.stop() == 0


@pytest.mark.ray
def test_every_protocol_answers_as_the_local_engine_does_to_the_bit(
    on_ray: Server, server: Server, google: ModuleType
) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with (
        grpc.insecure_channel(on_ray.grpc_address) as there,
        grpc.insecure_channel(server.grpc_address) as here,
    ):
        for request in (image_request(google, *PICTURES, id="1"), tensor_request(google, pixels, raw=True)):
            request.id = "1"
            assert grpc_call(there, google, "ModelInfer", request) == grpc_call(here, google, "ModelInfer", request)
    classified = json.dumps({"signature_name": "classification", **json.loads(v1_request(PICTURES[0]))})
    outputs = [{"name": name} for name in ("logits", "labels", "probabilities", "indices")]
    v2 = json.dumps(
        {
            "id": "1",
            "inputs": [
                {"name": "input-0", "datatype": "FP32", "shape": [2, 3, 224, 224], "data": pixels.ravel().tolist()}
            ],
            "outputs": outputs,
        }
    )
    for path, body in (
        ("/v1/models/custom-model:predict", v1_request(*PICTURES)),
        ("/v1/models/custom-model:predict", classified),
        ("/v2/models/custom-model/infer", v2),
    ):
        assert on_ray.post(path, body).json() == server.post(path, body).json()
    assert on_ray.get("/v2/models/custom-model").json() == server.get("/v2/models/custom-model").json()


@pytest.mark.ray
def test_errors_are_those_of_the_local_engine(on_ray: Server, server: Server) -> None:
    for body in (v1_request(b"\xff\xd8\xff"), "{", '{"instances": []}', '{"instances": [1]}'):
        there, here = on_ray.predict(body), server.predict(body)
        assert (there.status_code, there.json()) == (here.status_code, here.json())


@pytest.mark.ray
def test_what_nobody_foresaw_is_told_to_the_log_and_not_to_the_client(on_ray: Server) -> None:
    answer = on_ray.post("/v1/models/failing:predict", '{"instances": ["KeyError"]}')

    assert (answer.status_code, answer.json()) == (500, {"error": "Internal server error"})
    answer = on_ray.post("/v1/models/failing:predict", '{"instances": ["Overloaded"]}')
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


@pytest.mark.ray
def test_headers_ids_and_metrics_are_those_of_the_server(on_ray: Server) -> None:
    before = value(on_ray, "pinnace_batch_rows_sum", model_name="custom-model")
    answer = on_ray.predict(v1_request(*PICTURES[:3]), x_request_id="one of ours")

    assert answer.headers["x-request-id"] == "one of ours"
    assert 0 < float(answer.headers["prediction-time-latency"]) < 60_000
    assert value(on_ray, "pinnace_batch_rows_sum", model_name="custom-model") - before == 3
    assert value(on_ray, "request_predict_seconds_count", model_name="custom-model") > 0


@pytest.mark.ray
def test_a_replica_that_is_killed_under_load_costs_no_answer_and_comes_back(on_ray: Server) -> None:
    alone = on_ray.predict(v1_request(PICTURES[0])).json()
    first = replicas(on_ray.process)
    assert len(first) == 2

    def answers(client: httpx.Client) -> list[Any]:
        url = f"{on_ray.url}/v1/models/custom-model:predict"
        return [client.post(url, content=v1_request(PICTURES[0])).json() for _ in range(25)]

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as clients:
        given = [clients.submit(answers, client) for _ in range(8)]
        wait_for(lambda: value(on_ray, "pinnace_requests_queued_or_running") > 1)
        killed_at = time.monotonic()
        os.kill(min(first), signal.SIGKILL)
        assert [answer for answered in given for answer in answered.result()] == [alone] * 200
    while len(replicas(on_ray.process)) != 2 or min(first) in replicas(on_ray.process):
        assert time.monotonic() - killed_at < BACK_SECONDS
        on_ray.get("/")


@pytest.mark.ray
def test_a_model_that_has_lost_every_replica_answers_again_by_itself(on_ray: Server) -> None:
    request = '{"instances": ["InvalidInput"]}'
    assert on_ray.post("/v1/models/failing:predict", request).status_code == 400
    killed_at = time.monotonic()
    for process in replicas(on_ray.process, "failing"):
        os.kill(process, signal.SIGKILL)
    while (answer := on_ray.post("/v1/models/failing:predict", request)).status_code != 400:
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert time.monotonic() - killed_at < BACK_SECONDS


@pytest.mark.ray
def test_a_request_that_its_replicas_die_of_is_refused_and_the_model_comes_back() -> None:
    with running(*RAY, "--num_replicas=2", "--predictor=tests.predictors:Deadly") as server:
        died_at = time.monotonic()
        refused = server.predict('{"instances": [0]}')
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        while server.predict('{"instances": [1]}').status_code != 200:
            assert time.monotonic() - died_at < BACK_SECONDS


@pytest.mark.ray
def test_a_busy_model_holds_up_neither_another_nor_its_other_replica(gate: Callable[[str], Path]) -> None:
    held = gate("held")
    flags = ("--model=slow=,quick=", "--predictor=tests.predictors:BatchSize", "--max_ongoing_requests=1")

    def ask(model: str, instance: str) -> Any:
        return server.post(f"/v1/models/{model}:predict", json.dumps({"instances": [instance]})).json()

    with running(*RAY, "--num_replicas=2", *flags) as server, ThreadPoolExecutor(1) as client:
        slow = client.submit(ask, "slow", str(held))
        with held.open("wb"):
            assert ask("quick", "a") == {"predictions": [1]}
            assert [ask("slow", "a") for _ in range(4)] == [{"predictions": [1]}] * 4
            assert not slow.done()
        assert slow.result() == {"predictions": [1]}


@pytest.mark.ray
def test_a_call_past_its_deadline_leaves_the_replicas_queue(gate: Callable[[str], Path], google: ModuleType) -> None:
    held = gate("held")
    scaled = '--autoscaling_config={"min_replicas": 1, "max_replicas": 1}'
    late = image_request(google, b"late").SerializeToString()
    with running(*RAY, scaled, "--predictor=tests.predictors:BatchSize") as server, ThreadPoolExecutor(1) as client:
        first = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"), grpc.insecure_channel(server.grpc_address) as channel:
            call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                call(late, timeout=1)
            for _ in range(20):  # ways to the replica and back, by which it has heard of that
                assert server.predict('{"instances": []}').status_code == 400
        assert first.result().json() == {"predictions": [1]}
        assert server.predict('{"instances": ["a"]}').json() == {"predictions": [1]}
        assert value(server, "pinnace_dropped_requests_total", model_name="custom-model") == 1


@pytest.mark.ray
def test_a_model_is_unloaded_and_loaded_again() -> None:
    with running(*RAY, "--enable_model_repository=true", "--predictor=tests.predictors:Echo") as server:
        statuses = []
        for change in ("unload", "load"):
            assert server.post(f"/v2/repository/models/custom-model/{change}", "").status_code == 200
            statuses.append(server.predict('{"instances": ["a"]}').status_code)

    assert statuses == [503, 200]


@pytest.mark.ray
def test_a_head_that_is_lost_ends_the_server_after_its_requests_with_a_code_of_its_own(
    gate: Callable[[str], Path],
) -> None:
    held = gate("held")
    with (
        running(*RAY, "--predictor=tests.predictors:BatchSize") as server,
        ThreadPoolExecutor(1) as client,
    ):
        answer = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            (head,) = below(server.process, "gcs_server")
            os.kill(head, signal.SIGKILL)
            server.wait_for_line(re.compile("stopping: 1 requests to answer"))
        assert answer.result().json() == {"predictions": [1]}
        assert server.wait() == 11
    assert server.log[-1].startswith("app.py: Ray's head at ")


@pytest.mark.ray
def test_a_model_that_no_replica_can_load_ends_the_start_with_its_code_and_a_reason() -> None:
    code, lines = start_failing(*RAY, "--predictor=tests.predictors:Unloadable", "--http_port=0", "--grpc_port=0")

    assert code == 10
    (line,) = [line for line in lines if line.startswith("app.py: ")]
    assert line.startswith("app.py: Ray Serve cannot run custom-model: ")
    assert "no such table: weights" in line


@pytest.mark.ray
@pytest.mark.parametrize(
    "flag", ['--ray_actor_options={"num_cpus": "many"}', '--autoscaling_config={"min_replicas": 3, "max_replicas": 2}']
)
def test_options_that_ray_refuses_end_the_start_with_one_line(flag: str) -> None:
    code, lines = start_failing("--engine=ray", flag, "--predictor=tests.predictors:Echo", "--http_port=0")

    assert code == 2
    assert lines[-1].startswith("app.py: --ray_actor_options or --autoscaling_config: ")


@pytest.mark.ray
def test_a_fraction_of_a_gpu_is_that_fraction_of_its_memory() -> None:
    code = (
        "from pinnace.runtimes.ray_model import gpu_memory_percent; from pinnace.settings import Settings;"
        "print([gpu_memory_percent(Settings(), gpus) for gpus in (0, 0.5, 0.25, 1, 2)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert printed.stdout == "[100, 50, 25, 100, 100]\n"


@contextmanager
def ray_node(until: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ray start` for as long as the `with` lasts, and what it has printed until it was up."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | SECRET
    ) as process:
        assert process.stdout
        try:
            printed = ""
            while until not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            yield process, printed
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.ray
def test_a_cluster_runs_each_model_on_a_node_and_goes_on_without_one_of_them() -> None:
    flags = ("--engine=ray", "--model=one=,other=", "--predictor=tests.predictors:Echo")

    def ask(model: str) -> Any:
        return server.post(f"/v1/models/{model}:predict", '{"instances": ["a"]}').json()

    with ExitStack() as stack:
        head = ray_node("--address=", "--head", "--port=0", "--num-cpus=0", "--include-dashboard=false")
        (address,) = re.findall(r"--address='(.*)'", stack.enter_context(head)[1])
        nodes = [ray_node("Ray runtime started", f"--address={address}", "--num-cpus=1") for _ in range(2)]
        (first, _), (second, _) = map(stack.enter_context, nodes)
        server = stack.enter_context(running(*flags, environment=os.environ | SECRET | {"RAY_ADDRESS": address}))
        assert [ask("one"), ask("other")] == [{"predictions": ["a"]}] * 2
        (lost,) = [model for model in ("one", "other") if replicas(first, model)]
        (kept,) = [model for model in ("one", "other") if replicas(second, model)]
        assert lost != kept
        first.terminate()
        server.wait_for_line(re.compile(f"{lost} is not ready"))
        assert ask(kept) == {"predictions": ["a"]}
        assert server.get("/v2/health/ready").status_code == 200
        assert server.stop() == 0
