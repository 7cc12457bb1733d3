"""pinnace/runtimes/ray_model.py: the same answers from replicas in Ray Serve, and the loss of replicas."""

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

from tests.support.clients import call_grpc, make_image_request, make_tensor_request, make_v1_request
from tests.support.metrics import metric_value
from tests.support.pictures import PHOTOGRAPHS
from tests.support.servers import PROJECT, Server, expect_start_failure, is_alive, run_server
from tests.support.waiting import wait_for

RAY = ("--engine=ray", '--ray_actor_options={"num_cpus": 0.5}')
BACK_SECONDS = 30
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
PICTURES = list(PHOTOGRAPHS.values())


def find_replicas(ancestor: subprocess.Popen[Any], model: str = "custom-model") -> set[int]:
    """Return the process ids of the model's replicas."""
    return find_descendants(ancestor, "-f", f"^ray::ServeReplica:{model}:")


def find_descendants(ancestor: subprocess.Popen[Any], *pattern: str) -> set[int]:
    """Return the ids of the descendants that match the arguments of pgrep."""
    found = subprocess.run(["pgrep", *pattern], capture_output=True, text=True, check=False).stdout.split()
    return {int(process) for process in found if is_alive(int(process)) and is_descendant(int(process), ancestor.pid)}


def is_descendant(pid: int, ancestor_pid: int) -> bool:
    """Return whether a process is the ancestor, its child, or a child of those. Ray starts the server's replicas."""
    while pid > 1 and pid != ancestor_pid:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == ancestor_pid


@pytest.fixture(scope="module")
def on_ray(model_dir: Path) -> Iterator[Server]:
    """Serve a model with two replicas and a second model."""
    models = f"--model=custom-model={model_dir},failing="
    with run_server(*RAY, "--num_replicas=2", models, "--predictor=failing=tests.support.predictors:Failing") as server:
        yield server
        assert server.stop() == 0


@pytest.mark.ray
def test_answers_over_every_protocol_are_bit_equal_to_those_of_the_local_engine(
    on_ray: Server, server: Server, google: ModuleType
) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with (
        grpc.insecure_channel(on_ray.grpc_address) as ray_channel,
        grpc.insecure_channel(server.grpc_address) as local_channel,
    ):
        for request in (make_image_request(google, *PICTURES, id="1"), make_tensor_request(google, pixels, raw=True)):
            request.id = "1"
            assert call_grpc(ray_channel, google, "ModelInfer", request) == call_grpc(
                local_channel, google, "ModelInfer", request
            )
    classified = json.dumps({"signature_name": "classification", **json.loads(make_v1_request(PICTURES[0]))})
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
        ("/v1/models/custom-model:predict", make_v1_request(*PICTURES)),
        ("/v1/models/custom-model:predict", classified),
        ("/v2/models/custom-model/infer", v2),
    ):
        assert on_ray.post(path, body).json() == server.post(path, body).json()
    assert on_ray.get("/v2/models/custom-model").json() == server.get("/v2/models/custom-model").json()


@pytest.mark.ray
def test_errors_equal_those_of_the_local_engine(on_ray: Server, server: Server) -> None:
    for body in (make_v1_request(b"\xff\xd8\xff"), "{", '{"instances": []}', '{"instances": [1]}'):
        on_replica, locally = on_ray.predict(body), server.predict(body)
        assert (on_replica.status_code, on_replica.json()) == (locally.status_code, locally.json())


@pytest.mark.ray
def test_an_unexpected_exception_in_a_replica_is_an_internal_error_without_its_text(on_ray: Server) -> None:
    answer = on_ray.post("/v1/models/failing:predict", '{"instances": ["KeyError"]}')

    assert (answer.status_code, answer.json()) == (500, {"error": "Internal server error"})
    answer = on_ray.post("/v1/models/failing:predict", '{"instances": ["Overloaded"]}')
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


@pytest.mark.ray
def test_headers_request_ids_and_metrics_are_set_as_with_the_local_engine(on_ray: Server) -> None:
    before = metric_value(on_ray, "pinnace_batch_rows_sum", model_name="custom-model")
    answer = on_ray.predict(make_v1_request(*PICTURES[:3]), x_request_id="mine")

    assert answer.headers["x-request-id"] == "mine"
    assert 0 < float(answer.headers["prediction-time-latency"]) < 60_000
    assert metric_value(on_ray, "pinnace_batch_rows_sum", model_name="custom-model") - before == 3
    assert metric_value(on_ray, "request_predict_seconds_count", model_name="custom-model") > 0


@pytest.mark.ray
def test_a_replica_that_is_killed_under_load_loses_no_request_and_is_replaced(on_ray: Server) -> None:
    alone = on_ray.predict(make_v1_request(PICTURES[0])).json()
    first = find_replicas(on_ray.process)
    assert len(first) == 2

    def predict_25_times(client: httpx.Client) -> list[Any]:
        url = f"{on_ray.url}/v1/models/custom-model:predict"
        return [client.post(url, content=make_v1_request(PICTURES[0])).json() for _ in range(25)]

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as clients:
        given = [clients.submit(predict_25_times, client) for _ in range(8)]
        wait_for(lambda: metric_value(on_ray, "pinnace_requests_queued_or_running") > 1, "two requests in flight")
        killed_at = time.monotonic()
        os.kill(min(first), signal.SIGKILL)
        assert [answer for answered in given for answer in answered.result()] == [alone] * 200

    def is_replaced() -> bool:
        replicas = find_replicas(on_ray.process)
        return len(replicas) == 2 and min(first) not in replicas

    wait_for(is_replaced, "a new replica", killed_at + BACK_SECONDS - time.monotonic())


@pytest.mark.ray
def test_a_model_that_has_lost_every_replica_recovers(on_ray: Server) -> None:
    request = '{"instances": ["InvalidInput"]}'
    assert on_ray.post("/v1/models/failing:predict", request).status_code == 400
    killed_at = time.monotonic()
    for process in find_replicas(on_ray.process, "failing"):
        os.kill(process, signal.SIGKILL)
    while (answer := on_ray.post("/v1/models/failing:predict", request)).status_code != 400:
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert time.monotonic() - killed_at < BACK_SECONDS


@pytest.mark.ray
def test_a_request_that_kills_its_replicas_gets_503_and_the_model_recovers() -> None:
    with run_server(*RAY, "--num_replicas=2", "--predictor=tests.support.predictors:KillsItself") as server:
        died_at = time.monotonic()
        refused = server.predict('{"instances": [0]}')
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        seconds_left = died_at + BACK_SECONDS - time.monotonic()
        wait_for(lambda: server.predict('{"instances": [1]}').status_code == 200, "a new replica", seconds_left)


@pytest.mark.ray
def test_a_busy_replica_delays_neither_another_model_nor_another_replica(make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    flags = ("--model=slow=,quick=", "--predictor=tests.support.predictors:BatchSize", "--max_ongoing_requests=1")

    def predict(model: str, instance: str) -> Any:
        return server.post(f"/v1/models/{model}:predict", json.dumps({"instances": [instance]})).json()

    with run_server(*RAY, "--num_replicas=2", *flags) as server, ThreadPoolExecutor(1) as client:
        slow = client.submit(predict, "slow", str(held))
        with held.open("wb"):
            assert predict("quick", "a") == {"predictions": [1]}
            assert [predict("slow", "a") for _ in range(4)] == [{"predictions": [1]}] * 4
            assert not slow.done()
        assert slow.result() == {"predictions": [1]}


@pytest.mark.ray
def test_a_call_past_its_deadline_is_removed_from_the_replicas_queue(
    make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    held = make_gate("held")
    scaled = '--autoscaling_config={"min_replicas": 1, "max_replicas": 1}'
    late = make_image_request(google, b"late").SerializeToString()
    with (
        run_server(*RAY, scaled, "--predictor=tests.support.predictors:BatchSize") as server,
        ThreadPoolExecutor(1) as client,
    ):
        first = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"), grpc.insecure_channel(server.grpc_address) as channel:
            call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                call(late, timeout=1)
            for _ in range(20):  # round trips to the replica, after which it has processed the cancellation
                assert server.predict('{"instances": []}').status_code == 400
        assert first.result().json() == {"predictions": [1]}
        assert server.predict('{"instances": ["a"]}').json() == {"predictions": [1]}
        assert metric_value(server, "pinnace_dropped_requests_total", model_name="custom-model") == 1


@pytest.mark.ray
def test_a_model_is_unloaded_and_loaded_again() -> None:
    with run_server(*RAY, "--enable_model_repository=true", "--predictor=tests.support.predictors:Echo") as server:
        statuses = []
        for change in ("unload", "load"):
            assert server.post(f"/v2/repository/models/custom-model/{change}", "").status_code == 200
            statuses.append(server.predict('{"instances": ["a"]}').status_code)

    assert statuses == [503, 200]


@pytest.mark.ray
def test_the_server_ends_with_its_own_exit_code_after_its_requests_when_the_ray_head_is_lost(
    make_gate: Callable[[str], Path],
) -> None:
    held = make_gate("held")
    with (
        run_server(*RAY, "--predictor=tests.support.predictors:BatchSize") as server,
        ThreadPoolExecutor(1) as client,
    ):
        answer = client.submit(server.predict, json.dumps({"instances": [str(held)]}))
        with held.open("wb"):
            (head,) = find_descendants(server.process, "gcs_server")
            os.kill(head, signal.SIGKILL)
            server.wait_for_line(re.compile("stopping: 1 requests in flight"))
        assert answer.result().json() == {"predictions": [1]}
        assert server.wait() == 11
    assert server.log[-1].startswith("pinnace: the connection to Ray's head at ")


@pytest.mark.ray
def test_a_model_that_no_replica_can_load_stops_the_start_with_a_reason() -> None:
    code, lines = expect_start_failure(
        *RAY, "--predictor=tests.support.predictors:FailingLoad", "--http_port=0", "--grpc_port=0"
    )

    assert code == 10
    (line,) = [line for line in lines if line.startswith("pinnace: ")]
    assert line.startswith("pinnace: Ray Serve cannot run custom-model: ")
    assert "no such table: weights" in line


@pytest.mark.ray
@pytest.mark.parametrize(
    "flag", ['--ray_actor_options={"num_cpus": "many"}', '--autoscaling_config={"min_replicas": 3, "max_replicas": 2}']
)
def test_options_that_ray_refuses_stop_the_start_with_one_line(flag: str) -> None:
    code, lines = expect_start_failure(
        "--engine=ray", flag, "--predictor=tests.support.predictors:Echo", "--http_port=0"
    )

    assert code == 2
    assert lines[-1].startswith("pinnace: --ray_actor_options or --autoscaling_config is invalid: ")


@pytest.mark.ray
def test_a_replica_with_a_fraction_of_a_gpu_takes_that_fraction_of_its_memory() -> None:
    code = (
        "from pinnace.runtimes.ray_model import gpu_memory_percent; from pinnace.settings import Settings;"
        "print([gpu_memory_percent(Settings(), gpus) for gpus in (0, 0.5, 0.25, 1, 2)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert printed.stdout == "[100, 50, 25, 100, 100]\n"


@contextmanager
def run_ray_node(awaited_text: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `ray start` during the `with` block. Yield the process, and its output up to the line with `awaited_text`."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | SECRET
    ) as process:
        assert process.stdout
        try:
            printed = ""
            while awaited_text not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            yield process, printed
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.ray
def test_a_cluster_keeps_serving_the_other_model_when_a_node_is_lost() -> None:
    flags = ("--engine=ray", "--model=first=,second=", "--predictor=tests.support.predictors:Echo")

    def predict(model: str) -> Any:
        return server.post(f"/v1/models/{model}:predict", '{"instances": ["a"]}').json()

    with ExitStack() as stack:
        head = run_ray_node("--address=", "--head", "--port=0", "--num-cpus=0", "--include-dashboard=false")
        (address,) = re.findall(r"--address='(.*)'", stack.enter_context(head)[1])
        nodes = [run_ray_node("Ray runtime started", f"--address={address}", "--num-cpus=1") for _ in range(2)]
        (first, _), (second, _) = map(stack.enter_context, nodes)
        server = stack.enter_context(run_server(*flags, environment=os.environ | SECRET | {"RAY_ADDRESS": address}))
        assert [predict("first"), predict("second")] == [{"predictions": ["a"]}] * 2
        (lost,) = [model for model in ("first", "second") if find_replicas(first, model)]
        (kept,) = [model for model in ("first", "second") if find_replicas(second, model)]
        assert lost != kept
        first.terminate()
        server.wait_for_line(re.compile(f"{lost} is not ready"))
        assert predict(kept) == {"predictions": ["a"]}
        assert server.get("/v2/health/ready").status_code == 200
        assert server.stop() == 0
