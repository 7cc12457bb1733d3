"""app.py and pinnace/process/server.py: how the process starts, fails to start, drains and stops."""

from __future__ import annotations

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
from functools import partial
from pathlib import Path
from types import ModuleType

import grpc
import httpx
import pytest

from bench.server_process import children
from tests.support.clients import call_grpc, infer_over_grpc, make_v1_request, predict_over_rest
from tests.support.pictures import CAT
from tests.support.servers import (
    PROJECT,
    READY,
    STOPPING,
    expect_start_failure,
    read_until,
    refuses_connections,
    run_command,
    run_gated_server,
    run_server,
)
from tests.support.waiting import wait_for

ECHO = "--predictor=tests.support.predictors:Echo"
IMPORTED = re.compile(r"^import time:.*\| +(\S+)$")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_a_signal_ends_an_idle_server_with_exit_0(number: signal.Signals) -> None:
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        assert server.stop(number) == 0

    assert server.log[-1].endswith("stopped\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_nohup_has_started_ignores_the_end_of_its_terminal(workers: int) -> None:
    command = ["nohup", sys.executable, "app.py", ECHO, "--host=127.0.0.1", "--http_port=0", "--grpc_port=0"]
    with run_command([*command, f"--workers={workers}"]) as server:
        for _ in range(workers - 1):
            server.wait_for_line(READY)
        for process_id in (server.process.pid, *children(server.process.pid)):
            os.kill(process_id, signal.SIGHUP)
        assert server.get("/v2/health/ready").status_code == 200
        assert server.stop() == 0

    assert len([line for line in server.log if STOPPING.search(line)]) == workers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_requests_in_flight_on_both_ports_are_answered_before_the_server_stops(
    number: signal.Signals, tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [make_gate("rest"), make_gate("grpc")]
    with run_gated_server(tmp_path) as server, ThreadPoolExecutor() as clients:
        by_rest = clients.submit(predict_over_rest, server, "rest")
        by_grpc = clients.submit(infer_over_grpc, server, google, "grpc")
        with gates[0].open("wb"), gates[1].open("wb"):
            server.process.send_signal(number)
            assert server.wait_for_line(STOPPING)[1] == "2"

        assert by_rest.result().json() == {"predictions": ["rest"]}
        assert list(by_grpc.result().outputs[0].contents.bytes_contents) == [b"grpc"]
        assert server.wait() == 0


def test_a_stopping_server_refuses_new_connections_and_closes_idle_ones(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    waiting = make_gate("waiting")
    with run_gated_server(tmp_path) as server, ThreadPoolExecutor() as clients, server.connect() as idle:
        idle.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(idle, b'{"ready":true}')
        answer = clients.submit(predict_over_rest, server, "waiting")
        with waiting.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert idle.recv(65536) == b""
            for port in (server.http_port, server.grpc_port):
                wait_for(partial(refuses_connections, port), "a closed port")

        assert answer.result().status_code == 200
        assert server.wait() == 0


def test_a_stopping_server_refuses_new_connections_over_ipv6_too(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    """Hypercorn closes its sockets one after the other: https://github.com/pgjones/hypercorn/issues/308."""
    waiting = make_gate("waiting")
    with run_gated_server(tmp_path, "--host=") as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(predict_over_rest, server, "waiting")
        with waiting.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            for host in ("127.0.0.1", "::1"):
                wait_for(partial(refuses_connections, server.http_port, host), f"a closed port at {host}")

        assert answer.result().status_code == 200
        assert server.wait() == 0


@pytest.mark.parametrize("predictor", ["Gated", "GatedPredict"])
def test_requests_that_outlast_the_grace_period_are_cancelled_and_counted(
    predictor: str, tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    stuck = make_gate("stuck")
    with (
        run_gated_server(tmp_path, "--grace_period_seconds=1", predictor=predictor) as server,
        server.connect() as connection,
        ThreadPoolExecutor() as clients,
    ):
        body = b'{"instances": ["stuck"]}'
        head = b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        opened = clients.submit(stuck.open, "wb")
        with opened.result(timeout=30):
            assert server.stop() == 8

    assert server.log[-1] == "pinnace: stopped at the end of --grace_period_seconds with 1 requests unanswered\n"


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_a_second_signal_stops_at_once(workers: str, tmp_path: Path, make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path, workers) as server, ThreadPoolExecutor() as clients:
        clients.submit(predict_over_rest, server, "held").add_done_callback(lambda answer: answer.exception())
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_line(re.compile("stopping: 1"))
            assert server.stop() == 8

    assert "pinnace: stopped at a second signal with 1 requests unanswered\n" in server.log


def test_a_stopping_server_is_not_ready_but_answers_during_the_drain_delay(google: ModuleType) -> None:
    with run_server(ECHO, "--drain_delay_seconds=20") as server, grpc.insecure_channel(server.grpc_address) as channel:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line(STOPPING)

        assert server.get("/v2/health/ready").status_code == 503
        assert server.get("/v2/health/live").status_code == 200
        assert not call_grpc(channel, google, "ServerReady", google.ServerReadyRequest()).ready
        assert server.get("/v1/models/custom-model").status_code == 503
        assert server.get("/v2/models/custom-model/ready").status_code == 503
        assert not call_grpc(channel, google, "ModelReady", google.ModelReadyRequest(name="custom-model")).ready
        assert predict_over_rest(server, "a").json() == {"predictions": ["a"]}
        assert len(infer_over_grpc(server, google, "a").outputs) == 1
        assert server.stop() == 0  # the second signal ends the drain delay


def test_a_stopping_server_closes_keep_alive_connections_with_its_answers() -> None:
    """Otherwise they would stay connected until the end of the delay, and lose a request that they send then."""
    with run_server(ECHO, "--drain_delay_seconds=20") as server, httpx.Client(base_url=server.url) as client:
        assert "connection" not in client.get("/v1/models").headers
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line(STOPPING)

        assert client.get("/v1/models").headers["connection"] == "close"
        assert client.get("/v1/models").status_code == 200  # over a new connection
        assert server.stop() == 0


def test_the_drain_delay_ends_by_itself() -> None:
    with run_server(ECHO, "--drain_delay_seconds=1") as server:
        stopped_at = time.monotonic()
        assert server.stop() == 0

    assert 1 <= time.monotonic() - stopped_at < 10


def test_a_handler_that_never_returns_does_not_delay_the_stop(tmp_path: Path, make_gate: Callable[[str], Path]) -> None:
    make_gate("never")
    with run_gated_server(tmp_path, "--request_timeout_seconds=1") as server:
        assert predict_over_rest(server, "never").status_code == 504
        assert server.stop() == 0


def test_a_thread_of_a_predictor_delays_neither_a_stop_nor_the_end_of_a_check() -> None:
    predictor = "--predictor=tests.support.predictors:WithThread"
    with run_server(predictor) as server:
        assert server.stop() == 0
    assert expect_start_failure(predictor, "--check")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_after_the_last_answer_changes_nothing(number: signal.Signals) -> None:
    with run_server(ECHO) as server:
        server.process.send_signal(number)
        server.wait_for_line(re.compile("stopped$"))
        assert server.stop(number) == 0

    assert server.log[-1].endswith("stopped\n")


def test_a_signal_while_the_model_loads_ends_the_start_with_exit_0(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    command = [sys.executable, "app.py", "--predictor=tests.support.predictors:GatedLoad", f"--model_dir={tmp_path}"]
    with subprocess.Popen(
        [*command, "--http_port=0", "--grpc_port=0"], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    ) as process:
        with (tmp_path / "gate").open("wb"):  # blocks until load() reads it
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        assert process.stderr
        assert process.stderr.read().endswith("SIGTERM before ready: stopped\n")


def test_a_signal_during_an_import_that_catches_all_exceptions_ends_the_start() -> None:
    code, lines = expect_start_failure(
        "--predictor=tests.support.interrupted:Nothing", "--http_port=0", "--grpc_port=0"
    )

    assert code == 0
    assert lines[-1].endswith("SIGTERM before ready: stopped")


def test_the_ports_are_free_after_the_server_has_stopped() -> None:
    with run_server("--predictor=tests.support.predictors:Echo") as first:
        first.stop()

    with run_server(
        "--predictor=tests.support.predictors:Echo", f"--http_port={first.http_port}", f"--grpc_port={first.grpc_port}"
    ) as second:
        assert second.get("/").status_code == 200


def test_a_running_server_has_imported_neither_torch_nor_google_protobuf(model_dir: Path, google: ModuleType) -> None:
    with run_server(f"--model_dir={model_dir}", python_flags=["-X", "importtime"]) as server:
        assert server.predict(make_v1_request(CAT)).status_code == 200
        with grpc.insecure_channel(server.grpc_address) as channel:
            assert call_grpc(channel, google, "ServerLive", google.ServerLiveRequest()).live
        assert server.stop() == 0

    imported = {match[1].partition(".")[0] for line in server.log if (match := IMPORTED.match(line))}
    assert {"onnxruntime", "grpc", "hypercorn", "PIL"} <= imported
    assert not imported & {"torch", "torchvision", "onnx", "onnxscript", "google", "model_export", "fastapi", "uvicorn"}


def test_a_running_server_sends_no_usage_data_and_leaves_no_files(model_dir: Path, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry keeps an id in the temporary directory, and unsent data in the home directory."""
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    directories = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    with run_server(f"--model_dir={model_dir}", environment={**inherited, **directories}) as server:
        assert server.predict(make_v1_request(CAT)).status_code == 200
        assert server.stop() == 0

    assert list(tmp_path.iterdir()) == []


def test_probes_are_answered_while_the_model_is_busy(
    tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    busy = make_gate("busy")
    with run_gated_server(tmp_path, predictor="GatedPredict") as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(predict_over_rest, server, "busy")
        with busy.open("wb"):
            assert server.get("/v2/health/ready").json() == {"ready": True}
            with grpc.insecure_channel(server.grpc_address) as channel:
                assert call_grpc(channel, google, "ServerReady", google.ServerReadyRequest()).ready
        assert answer.result().status_code == 200


def test_a_seeded_model_warns_at_every_start(model_dir: Path) -> None:
    with run_server(f"--model_dir={model_dir}") as server:
        server.stop()

    assert [line for line in server.log if "custom-model: UNTRAINED WEIGHTS (seeded:0): the answers are mea" in line]


@pytest.mark.parametrize("flag", ["--http_port", "--grpc_port"])
def test_a_port_in_use_stops_the_start_with_its_exit_code_and_one_line(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as in_use:
        port = in_use.getsockname()[1]
        code, lines = expect_start_failure(ECHO, "--http_port=0", "--grpc_port=0", f"{flag}={port}")

    assert (code, len(lines)) == (3, 1)
    assert f"cannot listen on port {port}" in lines[0]
    assert flag in lines[0]


@pytest.mark.parametrize(
    ("flags", "code", "problem"),
    [
        (["--no_such_flag"], 2, "pinnace: unknown flag --no_such_flag (--help lists the flags)"),
        (["--model_dir=/no/such/folder"], 4, "pinnace: the path of custom-model, /no/such/folder, does n"),
        (["--model_dir=tests"], 4, "pinnace: tests must hold exactly one .onnx file, and holds none: see --model_dir"),
        (["--model_dir=README.md"], 5, "pinnace: README.md cannot be loaded ("),
        (["--predictor=no.such.module:Class"], 7, "pinnace: --predictor=no.such.module:Class cannot be imported: Mod"),
        (
            ["--predictor=tests.support.predictors:Absent"],
            7,
            "pinnace: --predictor=tests.support.predictors:Absent cannot be imported",
        ),
        (["--predictor=json:JSONDecoder"], 7, "pinnace: --predictor=json:JSONDecoder is not a subclass of pinnac"),
        (
            ["--predictor=tests.support.predictors:ExitingLoad"],
            7,
            "pinnace: ExitingLoad failed to load: SystemExit: no weights",
        ),
        (
            ["--predictor=tests.support.predictors:FailingLoad"],
            7,
            "pinnace: FailingLoad failed to load: RuntimeError: no such ta",
        ),
        (
            ["--predictor=tests.support.predictors:HugeLoad"],
            7,
            "pinnace: HugeLoad failed to load: not enough memory, MemoryError: ",
        ),
    ],
)
def test_a_failing_start_ends_with_its_exit_code_and_one_line(flags: list[str], code: int, problem: str) -> None:
    exit_code, lines = expect_start_failure("--http_port=0", "--grpc_port=0", *flags)

    assert (exit_code, len(lines)) == (code, 1)
    assert lines[0].startswith(problem)


@pytest.mark.parametrize("flag", ["--model_dir=", "--model=a=", "--storage_uri="])
@pytest.mark.parametrize("path", ["locked", "locked/model.onnx"])
def test_an_unreadable_model_stops_the_start_with_its_exit_code_and_one_line(
    flag: str, path: str, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    without_privileges = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [sys.executable, "app.py", "--http_port=0", "--grpc_port=0", f"{flag}{tmp_path}/{path}"]
    command = [*without_privileges, *command]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert done.stderr.startswith("pinnace: ")


def test_a_start_without_standard_error_succeeds() -> None:
    command = f"exec {sys.executable} app.py --check --predictor=tests.support.predictors:Echo 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "custom-model: ready")


def test_unavailable_cuda_stops_the_start_with_its_exit_code_and_one_line(model_dir: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here: the demand for CUDA may be met")
    code, lines = expect_start_failure(f"--model_dir={model_dir}", "--device=cuda", "--http_port=0", "--grpc_port=0")

    assert (code, len(lines)) == (6, 1)
    assert lines[0].startswith("pinnace: --device=cuda, but CUDA is not available")


def test_without_grpc_no_port_serves_grpc(google: ModuleType) -> None:
    with run_server(ECHO, "--enable_grpc=false") as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.http_port}") as channel, pytest.raises(grpc.RpcError) as error:
            call_grpc(channel, google, "ServerLive", google.ServerLiveRequest())
        assert server.get("/v2/health/ready").json() == {"ready": True}
        assert server.stop() == 0

    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.grpc_port == 0


def test_uvloop_serves_and_stops_as_asyncio_does(
    tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [make_gate("rest"), make_gate("grpc")]
    with run_gated_server(tmp_path, "--event_loop=uvloop") as server, ThreadPoolExecutor() as clients:
        answers = [
            clients.submit(predict_over_rest, server, "rest"),
            clients.submit(infer_over_grpc, server, google, "grpc"),
        ]
        with gates[0].open("wb"), gates[1].open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_line(STOPPING)[1] == "2"
        assert [answer.result() is not None for answer in answers] == [True, True]
        assert server.wait() == 0


def test_the_protocol_variable_of_the_platform_is_logged() -> None:
    with run_server(ECHO, environment={**os.environ, "PROTOCOL": "V2"}) as server:
        server.stop()

    assert [line for line in server.log if line.endswith(", protocol v2\n")]


def test_settings_are_read_from_the_environment(model_dir: Path) -> None:
    environment = {**os.environ, "PINNACE_MODEL_NAME": "flowers", "PINNACE_MODEL_DIR": str(model_dir)}
    with run_server(environment=environment) as server:
        assert server.get("/v1/models").json() == {"models": ["flowers"]}


def test_the_procfiles_command_serves(model_dir: Path) -> None:
    name, _, command = (PROJECT / "Procfile").read_text().strip().partition(": ")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PINNACE_MODEL_DIR": str(model_dir),
        "PINNACE_HTTP_PORT": "0",
        "PINNACE_GRPC_PORT": "0",
    }
    with run_command(["bash", "-c", command], environment) as server:
        assert server.get("/v1/models").json() == {"models": ["custom-model"]}
        assert server.stop() == 0

    assert name == "web"
