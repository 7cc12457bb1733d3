"""app.py and serving/lifecycle.py as processes: how they start, fail, drain and stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import pytest

from tests.conftest import grpc_call
from tests.pictures import CAT, v1_request
from tests.servers import PROJECT, Server, gated, read_until, running, start_failing

ECHO = "--predictor=tests.predictors:Echo"
STOPPING = re.compile(r"stopping: (\d+) requests to answer")
IMPORTED = re.compile(r"^import time:.*\| +(\S+)$")


def rest(server: Server, instance: str) -> Any:
    return server.predict(json.dumps({"instances": [instance]}))


def grpc_infer(server: Server, google: ModuleType, instance: str) -> Any:
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(instance.encode())
    with grpc.insecure_channel(server.grpc_address) as channel:
        return grpc_call(channel, google, "ModelInfer", request)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_an_idle_server_with_exit_0(number: signal.Signals) -> None:
    with running("--predictor=tests.predictors:Echo") as server:
        assert server.stop(number) == 0

    assert server.log[-1].endswith("stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_in_flight_on_both_ports_is_answered_before_the_end(
    number: signal.Signals, tmp_path: Path, gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [gate("rest"), gate("grpc")]
    with gated(tmp_path) as server, ThreadPoolExecutor() as clients:
        by_rest = clients.submit(rest, server, "rest")
        by_grpc = clients.submit(grpc_infer, server, google, "grpc")
        with gates[0].open("wb"), gates[1].open("wb"):
            server.process.send_signal(number)
            assert server.wait_for_line(STOPPING)[1] == "2"

        assert by_rest.result().json() == {"predictions": ["rest"]}
        assert list(by_grpc.result().outputs[0].contents.bytes_contents) == [b"grpc"]
        assert server.wait() == 0


def test_a_stopping_server_refuses_new_connections_and_closes_idle_ones(
    tmp_path: Path, gate: Callable[[str], Path]
) -> None:
    waiting = gate("waiting")
    with gated(tmp_path) as server, ThreadPoolExecutor() as clients, server.connect() as idle:
        idle.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(idle, b'{"ready":true}')
        answer = clients.submit(rest, server, "waiting")
        with waiting.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert idle.recv(65536) == b""
            for port in (server.http_port, server.grpc_port):
                wait_until_refused(port)

        assert answer.result().status_code == 200
        assert server.wait() == 0


def test_a_stopping_server_refuses_new_connections_over_ipv6_too(tmp_path: Path, gate: Callable[[str], Path]) -> None:
    """Hypercorn closes the sockets one after the other: https://github.com/pgjones/hypercorn/issues/308."""
    waiting = gate("waiting")
    with gated(tmp_path, "--host=") as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(rest, server, "waiting")
        with waiting.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            for host in ("127.0.0.1", "::1"):
                wait_until_refused(server.http_port, host)

        assert answer.result().status_code == 200
        assert server.wait() == 0


def wait_until_refused(port: int, host: str = "127.0.0.1") -> None:
    """Connections that come while the listener closes may be taken and reset: not yet refused."""
    deadline = time.monotonic() + 10
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < deadline:
            with suppress(ConnectionResetError):
                socket.create_connection((host, port), timeout=5).close()


@pytest.mark.parametrize("predictor", ["Gated", "GatedPredict"])
def test_a_request_that_outlasts_the_grace_period_is_cut_and_counted(
    predictor: str, tmp_path: Path, gate: Callable[[str], Path]
) -> None:
    stuck = gate("stuck")
    with (
        gated(tmp_path, "--grace_period_seconds=1", predictor=predictor) as server,
        server.connect() as connection,
        ThreadPoolExecutor() as clients,
    ):
        body = b'{"instances": ["stuck"]}'
        head = b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        opened = clients.submit(stuck.open, "wb")
        with opened.result(timeout=30):
            assert server.stop() == 8

    assert server.log[-1] == "app.py: stopped at the end of --grace_period_seconds with 1 requests unanswered\n"


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_a_second_signal_stops_at_once(workers: str, tmp_path: Path, gate: Callable[[str], Path]) -> None:
    held = gate("held")
    with gated(tmp_path, workers) as server, ThreadPoolExecutor() as clients:
        clients.submit(rest, server, "held").add_done_callback(lambda answer: answer.exception())
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_line(re.compile("stopping: 1"))
            assert server.stop() == 8

    assert "app.py: stopped at a second signal with 1 requests unanswered\n" in server.log


def test_a_stopping_server_is_not_ready_and_answers_until_the_drain_delay_is_over(google: ModuleType) -> None:
    with running(ECHO, "--drain_delay_seconds=20") as server, grpc.insecure_channel(server.grpc_address) as channel:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line(STOPPING)

        assert server.get("/v2/health/ready").status_code == 503
        assert server.get("/v2/health/live").status_code == 200
        assert not grpc_call(channel, google, "ServerReady", google.ServerReadyRequest()).ready
        assert server.get("/v1/models/custom-model").status_code == 503
        assert server.get("/v2/models/custom-model/ready").status_code == 503
        assert not grpc_call(channel, google, "ModelReady", google.ModelReadyRequest(name="custom-model")).ready
        assert rest(server, "a").json() == {"predictions": ["a"]}
        assert len(grpc_infer(server, google, "a").outputs) == 1
        assert server.stop() == 0  # at once, by a second signal


def test_a_stopping_server_sends_keep_alive_clients_elsewhere() -> None:
    """They would stay with it to the end of the delay, and be cut there in the midst of a next request."""
    with running(ECHO, "--drain_delay_seconds=20") as server, httpx.Client(base_url=server.url) as client:
        assert "connection" not in client.get("/v1/models").headers
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line(STOPPING)

        assert client.get("/v1/models").headers["connection"] == "close"
        assert client.get("/v1/models").status_code == 200  # over a new connection
        assert server.stop() == 0


def test_the_drain_delay_ends_by_itself() -> None:
    with running(ECHO, "--drain_delay_seconds=1") as server:
        stopped_at = time.monotonic()
        assert server.stop() == 0

    assert 1 <= time.monotonic() - stopped_at < 10


def test_a_handler_that_never_returns_does_not_hold_up_the_end(tmp_path: Path, gate: Callable[[str], Path]) -> None:
    gate("never")
    with gated(tmp_path, "--request_timeout_seconds=1") as server:
        assert rest(server, "never").status_code == 504
        assert server.stop() == 0


def test_a_thread_of_a_predictors_own_does_not_hold_up_the_end_nor_that_of_a_check() -> None:
    predictor = "--predictor=tests.predictors:Threaded"
    with running(predictor) as server:
        assert server.stop() == 0
    assert start_failing(predictor, "--check")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_when_all_is_answered_changes_nothing(number: signal.Signals) -> None:
    with running(ECHO) as server:
        server.process.send_signal(number)
        server.wait_for_line(re.compile("stopped$"))
        assert server.stop(number) == 0

    assert server.log[-1].endswith("stopped\n")


def test_a_signal_while_the_model_loads_ends_at_once_with_exit_0(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    command = [sys.executable, "app.py", "--predictor=tests.predictors:GatedLoad", f"--model_dir={tmp_path}"]
    with subprocess.Popen(
        [*command, "--http_port=0", "--grpc_port=0"], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    ) as process:
        with (tmp_path / "gate").open("wb"):  # opens when load() reads
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        assert process.stderr
        assert process.stderr.read().endswith("SIGTERM before ready: stopped\n")


def test_a_signal_amid_an_import_that_catches_all_ends_the_start_as_well() -> None:
    code, lines = start_failing("--predictor=tests.interrupted:Nothing", "--http_port=0", "--grpc_port=0")

    assert code == 0
    assert lines[-1].endswith("SIGTERM before ready: stopped")


def test_the_ports_are_free_when_the_server_has_stopped() -> None:
    with running("--predictor=tests.predictors:Echo") as first:
        first.stop()

    with running(
        "--predictor=tests.predictors:Echo", f"--http_port={first.http_port}", f"--grpc_port={first.grpc_port}"
    ) as second:
        assert second.get("/").status_code == 200


def test_a_running_server_has_imported_neither_torch_nor_googles_protobuf(model_dir: Path, google: ModuleType) -> None:
    with running(f"--model_dir={model_dir}", python_flags=["-X", "importtime"]) as server:
        assert server.predict(v1_request(CAT)).status_code == 200
        with grpc.insecure_channel(server.grpc_address) as channel:
            assert grpc_call(channel, google, "ServerLive", google.ServerLiveRequest()).live
        assert server.stop() == 0

    imported = {match[1].partition(".")[0] for line in server.log if (match := IMPORTED.match(line))}
    assert {"onnxruntime", "grpc", "hypercorn", "PIL"} <= imported
    assert not imported & {"torch", "torchvision", "onnx", "onnxscript", "google", "model_export", "fastapi", "uvicorn"}


def test_a_running_server_sends_nobody_usage_data_and_leaves_no_files(model_dir: Path, tmp_path: Path) -> None:
    """ONNX Runtime would: it then keeps an id in the temporary directory, and what it has not sent in the home."""
    untold = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    places = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    with running(f"--model_dir={model_dir}", environment={**untold, **places}) as server:
        assert server.predict(v1_request(CAT)).status_code == 200
        assert server.stop() == 0

    assert list(tmp_path.iterdir()) == []


def test_probes_are_answered_while_the_model_is_busy(
    tmp_path: Path, gate: Callable[[str], Path], google: ModuleType
) -> None:
    busy = gate("busy")
    with gated(tmp_path, predictor="GatedPredict") as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(rest, server, "busy")
        with busy.open("wb"):
            assert server.get("/v2/health/ready").json() == {"ready": True}
            with grpc.insecure_channel(server.grpc_address) as channel:
                assert grpc_call(channel, google, "ServerReady", google.ServerReadyRequest()).ready
        assert answer.result().status_code == 200


def test_a_seeded_model_warns_at_every_start(model_dir: Path) -> None:
    with running(f"--model_dir={model_dir}") as server:
        server.stop()

    assert [line for line in server.log if "custom-model: UNTRAINED WEIGHTS (seeded:0): the answers are mea" in line]


@pytest.mark.parametrize("flag", ["--http_port", "--grpc_port"])
def test_a_port_in_use_ends_the_start_with_its_code_and_one_line(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = start_failing(ECHO, "--http_port=0", "--grpc_port=0", f"{flag}={port}")

    assert (code, len(lines)) == (3, 1)
    assert f"cannot listen on port {port}" in lines[0]
    assert flag in lines[0]


@pytest.mark.parametrize(
    ("flags", "code", "problem"),
    [
        (["--no_such_flag"], 2, "app.py: unrecognized arguments: --no_such_flag (--help lists the flags)"),
        (["--model_dir=/no/such/folder"], 4, "app.py: /no/such/folder, where custom-model should be, does n"),
        (["--model_dir=tests"], 4, "app.py: tests must hold exactly one .onnx file, and holds none: see --model_dir"),
        (["--model_dir=README.md"], 5, "app.py: README.md cannot be loaded ("),
        (["--predictor=no.such.module:Class"], 7, "app.py: --predictor=no.such.module:Class cannot be imported: Mod"),
        (["--predictor=tests.predictors:Absent"], 7, "app.py: --predictor=tests.predictors:Absent cannot be imported"),
        (["--predictor=json:JSONDecoder"], 7, "app.py: --predictor=json:JSONDecoder is no subclass of pinnace.predi"),
        (["--predictor=tests.predictors:EndingLoad"], 7, "app.py: EndingLoad failed to load: SystemExit: no weights"),
        (["--predictor=tests.predictors:Unloadable"], 7, "app.py: Unloadable failed to load: RuntimeError: no such ta"),
    ],
)
def test_a_start_that_cannot_succeed_ends_with_its_code_and_one_line(flags: list[str], code: int, problem: str) -> None:
    ended, lines = start_failing("--http_port=0", "--grpc_port=0", *flags)

    assert (ended, len(lines)) == (code, 1)
    assert lines[0].startswith(problem)


@pytest.mark.parametrize("flag", ["--model_dir=", "--model=a=", "--storage_uri="])
@pytest.mark.parametrize("path", ["locked", "locked/model.onnx"])
def test_a_model_that_may_not_be_read_ends_the_start_with_its_code_and_one_line(
    flag: str, path: str, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    without_privileges = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [sys.executable, "app.py", "--http_port=0", "--grpc_port=0", f"{flag}{tmp_path}/{path}"]
    command = [*without_privileges, *command]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert done.stderr.startswith("app.py: ")


def test_a_start_without_standard_error_is_one_all_the_same() -> None:
    command = f"exec {sys.executable} app.py --check --predictor=tests.predictors:Echo 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "custom-model: ready")


def test_cuda_that_cannot_be_had_ends_the_start_with_its_code_and_one_line(model_dir: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here: the demand for CUDA may be met")
    code, lines = start_failing(f"--model_dir={model_dir}", "--device=cuda", "--http_port=0", "--grpc_port=0")

    assert (code, len(lines)) == (6, 1)
    assert lines[0].startswith("app.py: --device=cuda, but CUDA cannot be had")


def test_without_grpc_no_port_answers_it(google: ModuleType) -> None:
    with running(ECHO, "--enable_grpc=false") as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel, pytest.raises(grpc.RpcError) as error:
            grpc_call(channel, google, "ServerLive", google.ServerLiveRequest())
        assert server.get("/v2/health/ready").json() == {"ready": True}
        assert server.stop() == 0

    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.grpc_port == 0


def test_uvloop_serves_and_stops_as_asyncio_does(
    tmp_path: Path, gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [gate("rest"), gate("grpc")]
    with gated(tmp_path, "--event_loop=uvloop") as server, ThreadPoolExecutor() as clients:
        answers = [clients.submit(rest, server, "rest"), clients.submit(grpc_infer, server, google, "grpc")]
        with gates[0].open("wb"), gates[1].open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_line(STOPPING)[1] == "2"
        assert [answer.result() is not None for answer in answers] == [True, True]
        assert server.wait() == 0


def test_the_protocol_that_the_platform_names_is_logged() -> None:
    with running(ECHO, environment={**os.environ, "PROTOCOL": "V2"}) as server:
        server.stop()

    assert [line for line in server.log if line.endswith("of which the platform wants v2\n")]


def test_settings_are_taken_from_the_environment(model_dir: Path) -> None:
    environment = {**os.environ, "PINNACE_MODEL_NAME": "flowers", "PINNACE_MODEL_DIR": str(model_dir)}
    with running(environment=environment) as server:
        assert server.get("/v1/models").json() == {"models": ["flowers"]}


def test_the_procfiles_command_serves(model_dir: Path) -> None:
    name, _, command = (PROJECT / "Procfile").read_text().strip().partition(": ")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PINNACE_MODEL_DIR": str(model_dir),
        "PINNACE_HTTP_PORT": "0",
        "PINNACE_GRPC_PORT": "0",
    }
    with subprocess.Popen(
        ["bash", "-c", command], cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        server = Server(process, process.stderr)
        try:
            server.wait_until_ready()
            assert server.get("/v1/models").json() == {"models": ["custom-model"]}
            assert server.stop() == 0
        finally:
            server.end()

    assert name == "web"
