"""pinnace/process/supervisor.py: several worker processes behind the ports of one server."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import grpc
import pytest

from bench.server_process import children
from tests.support.clients import call_grpc, infer_over_grpc, make_image_request, make_v1_request, predict_over_rest
from tests.support.metrics import metric_value, requests_by_outcome
from tests.support.pictures import CAT
from tests.support.servers import (
    PROJECT,
    TWO_WORKERS,
    Server,
    expect_start_failure,
    is_alive,
    read_until,
    refuses_connections,
    run_gated_server,
    run_server,
)
from tests.support.waiting import wait_for

WORKERS = 2
PREDICT = b"/v1/models/custom-model:predict"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Server]:
    """Run two workers that answer with their process id. A worker can only load while the file `model` exists."""
    (tmp_path / "model").write_text("")
    with run_server(TWO_WORKERS, "--predictor=tests.support.predictors:ProcessId", f"--model_dir={tmp_path}") as server:
        find_workers(server)
        yield server


def get_answering_process(server: Server) -> int:
    """Send one request on a new connection, and return the id of the process that answered."""
    (process_id,) = server.predict('{"instances": [0]}').json()["predictions"]
    return int(process_id)


def find_answering_processes(server: Server) -> set[int]:
    """Return the processes that answer now. Requests are concurrent: single ones may always reach the same process."""
    with ThreadPoolExecutor(8) as clients:
        return set(clients.map(lambda _: get_answering_process(server), range(16)))


def find_workers(server: Server) -> set[int]:
    """Wait until every worker has answered, and return their ids. On a busy machine one may accept all for a while."""
    found: set[int] = set()

    def all_answer() -> bool:
        found.clear()
        found.update(find_answering_processes(server))
        return len(found) == WORKERS

    wait_for(all_answer, f"answers of {WORKERS} workers")
    return found


def is_stopped(process_id: int) -> bool:
    return ") T " in Path(f"/proc/{process_id}/stat").read_text()


def test_only_workers_answer_and_all_of_them_answer_both_ports(two: Server, google: ModuleType) -> None:
    processes = find_workers(two)

    seen: set[int] = set()

    def all_seen() -> bool:
        seen.add(infer_over_grpc(two, google, "0").outputs[0].contents.int64_contents[0])
        return seen == processes

    wait_for(all_seen, "calls that every worker has answered")
    assert two.process.pid not in processes


def test_a_worker_that_wakes_first_does_not_accept_all_connections(two: Server) -> None:
    first, second = find_workers(two)
    body = b'{"instances": [1]}'
    request = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (PREDICT, len(body)) + body
    with ExitStack() as stack:
        for process_id in (first, second):
            stack.callback(os.kill, process_id, signal.SIGCONT)
            os.kill(process_id, signal.SIGSTOP)
            wait_for(partial(is_stopped, process_id), "a stopped worker")
        connections = [stack.enter_context(two.connect()) for _ in range(64)]
        for connection in connections:
            connection.sendall(request)
        os.kill(first, signal.SIGCONT)
        # Its first prediction stops it; by then it has accepted some connections.
        wait_for(partial(is_stopped, first), "a stop of the first worker")
        os.kill(second, signal.SIGCONT)
        # A connection that the first worker left stops the second.
        wait_for(partial(is_stopped, second), "a stop of the second worker")
        for process_id in (first, second):
            os.kill(process_id, signal.SIGCONT)
        answers = {read_until(connection, b"]}").rpartition(b"[")[2] for connection in connections}

    assert answers == {b"%d]}" % first, b"%d]}" % second}


def test_a_killed_worker_is_replaced_while_the_other_answers(two: Server) -> None:
    killed, other = find_workers(two)

    os.kill(killed, signal.SIGKILL)
    two.wait_for_line(re.compile(r"worker \d exited with code 137: restarting in 0\.5 s"))
    answering = {get_answering_process(two) for _ in range(10)}
    assert other in answering
    assert killed not in answering
    assert killed not in find_workers(two)


def test_a_killed_worker_with_a_surviving_child_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with run_server(TWO_WORKERS, "--predictor=tests.support.predictors:Forking", f"--model_dir={tmp_path}") as server:
        killed, _ = find_workers(server)
        os.kill(killed, signal.SIGKILL)
        server.wait_for_line(re.compile(r"worker \d exited with code 137: restarting in 0\.5 s"))
        assert killed not in find_workers(server)
        for child in tmp_path.glob("child-*"):
            os.kill(int(child.name.removeprefix("child-")), signal.SIGKILL)
        assert server.stop() == 0


def test_a_worker_that_hangs_is_killed_and_replaced_while_the_other_answers(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    flags = (TWO_WORKERS, "--predictor=tests.support.predictors:ProcessId", f"--model_dir={tmp_path}")
    with run_server(*flags, "--worker_timeout_seconds=3") as server:
        hanging, other = find_workers(server)
        os.kill(hanging, signal.SIGSTOP)
        server.wait_for_line(re.compile(rf"worker process {hanging} has not responded for 3 s .*: killed"))
        server.wait_for_line(re.compile(r"worker \d exited with code 137: restarting in 0\.5 s"))
        answering = {get_answering_process(server) for _ in range(10)}
        assert other in answering
        assert hanging not in answering
        assert hanging not in find_workers(server)
        assert server.stop() == 0


def test_workers_outlive_a_pause_of_all_processes(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    flags = (TWO_WORKERS, "--predictor=tests.support.predictors:ProcessId", f"--model_dir={tmp_path}")
    with run_server(*flags, "--worker_timeout_seconds=2") as server:
        workers = find_workers(server)
        processes = (server.process.pid, *workers)
        for process_id in processes:
            os.kill(process_id, signal.SIGSTOP)
        time.sleep(4)  # the pause of which nobody may learn
        for process_id in reversed(processes):
            os.kill(process_id, signal.SIGCONT)
        assert find_workers(server) == workers
        assert server.stop() == 0

    assert not [line for line in server.log if "killed" in line]


def test_workers_that_load_longer_than_the_worker_timeout_are_not_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    flags = ("--predictor=tests.support.predictors:GatedLoad", f"--model_dir={tmp_path}", "--worker_timeout_seconds=2")
    command = [sys.executable, "app.py", "--host=127.0.0.1", "--http_port=0", "--grpc_port=0", TWO_WORKERS, *flags]
    with subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        server = Server(process, process.stderr)
        try:
            with (tmp_path / "gate").open("wb"):
                wait_for(lambda: len(children(process.pid)) == WORKERS, "both workers")
                workers = children(process.pid)
                time.sleep(4)  # longer than the timeout
                assert children(process.pid) == workers
            server.wait_until_ready()
            assert children(process.pid) == workers
            assert server.stop() == 0
        finally:
            server.kill()


def test_workers_that_get_the_signal_too_answer_what_they_have_accepted(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path, TWO_WORKERS) as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(predict_over_rest, server, "held")
        with held.open("wb"):
            for process_id in (server.process.pid, *children(server.process.pid)):
                with suppress(ProcessLookupError):  # a worker without requests may have ended
                    os.kill(process_id, signal.SIGTERM)
            wait_for(partial(refuses_connections, server.http_port), "a closed HTTP port")
        assert answer.result().status_code == 200
        assert server.wait() == 0


def test_a_worker_that_cannot_start_is_restarted_with_growing_delays(two: Server, tmp_path: Path) -> None:
    killed, other = find_workers(two)
    (tmp_path / "model").rename(tmp_path / "elsewhere")

    os.kill(killed, signal.SIGKILL)
    two.wait_for_line(re.compile(r"worker \d exited with code 7: restarting in 1\.0 s"))
    two.wait_for_line(re.compile(r"worker \d exited with code 7: restarting in 2\.0 s"))
    assert find_answering_processes(two) == {other}

    (tmp_path / "elsewhere").rename(tmp_path / "model")
    assert len(find_workers(two)) == WORKERS
    assert two.stop() == 0


def test_a_worker_that_cannot_start_for_lack_of_descriptors_is_tried_again(two: Server) -> None:
    killed, other = find_workers(two)
    _, hard_limit = resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE, (3, hard_limit))

    os.kill(killed, signal.SIGKILL)
    two.wait_for_line(re.compile(r"worker \d cannot be started: .*Too many open files"))
    assert find_answering_processes(two) == {other}

    resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    assert len(find_workers(two)) == WORKERS
    assert two.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_a_stop_answers_what_every_worker_has_accepted(
    number: signal.Signals, tmp_path: Path, make_gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [make_gate(f"gate{count}") for count in range(4)]
    with run_gated_server(tmp_path, TWO_WORKERS) as server, ThreadPoolExecutor(len(gates)) as clients:
        over_rest = [clients.submit(predict_over_rest, server, path.name) for path in gates[:2]]
        over_grpc = [clients.submit(infer_over_grpc, server, google, path.name) for path in gates[2:]]
        held = [path.open("wb") for path in gates]
        server.process.send_signal(number)
        server.wait_for_line(re.compile("stopping: "))
        for file in held:
            file.close()

        assert [answer.result().status_code for answer in over_rest] == [200] * 2
        assert [len(answer.result().outputs) for answer in over_grpc] == [1] * 2
        assert server.wait() == 0


def test_the_exit_code_of_a_worker_at_the_end_of_the_grace_period_is_the_servers(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path, TWO_WORKERS, "--grace_period_seconds=1") as server, ThreadPoolExecutor() as clients:
        clients.submit(predict_over_rest, server, "held")
        with held.open("wb"):
            assert server.stop() == 8


def test_the_workers_end_when_their_supervisor_is_killed(two: Server) -> None:
    processes = find_workers(two)

    two.process.kill()

    wait_for(lambda: not any(is_alive(worker) for worker in processes), "the end of the workers")


def test_a_start_removes_the_metrics_of_a_killed_server_and_keeps_those_of_a_running_one() -> None:
    def metrics_directories(server: Server) -> set[str]:
        variables = (Path(f"/proc/{children(server.process.pid)[0]}/environ")).read_text().split("\0")
        return {text.partition("=")[2] for text in variables if text.startswith("PROMETHEUS_MULTIPROC_DIR=")}

    flags = (TWO_WORKERS, "--predictor=tests.support.predictors:Echo")
    with run_server(*flags) as running:
        (kept,) = metrics_directories(running)
        with run_server(*flags) as killed:
            (left,) = metrics_directories(killed)
            processes = (killed.process.pid, *children(killed.process.pid))
            for process_id in processes:
                os.kill(process_id, signal.SIGKILL)
            wait_for(lambda: not any(map(is_alive, processes)), "the end of the processes")
        assert Path(left).exists()
        with run_server(*flags):
            assert not Path(left).exists()
            assert Path(kept).exists()


def test_an_error_in_the_first_start_of_a_worker_ends_the_server_with_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")

    code, lines = expect_start_failure(TWO_WORKERS, f"--model_dir={tmp_path}", "--http_port=0", "--grpc_port=0")

    assert code == 5
    assert any("cannot be loaded" in line for line in lines)


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_port_in_use_stops_the_start_before_any_worker_starts(port: str) -> None:
    other = {"http_port": "grpc_port", "grpc_port": "http_port"}[port]
    with socket.create_server(("127.0.0.1", 0)) as in_use:
        number = in_use.getsockname()[1]
        code, (line,) = expect_start_failure(TWO_WORKERS, f"--{port}={number}", f"--{other}=0")

    assert code == 3
    assert f"cannot listen on port {number}" in line


def test_a_port_of_a_running_server_is_in_use(two: Server) -> None:
    code, _ = expect_start_failure(TWO_WORKERS, "--http_port=0", f"--grpc_port={two.grpc_port}")

    assert code == 3


def test_the_metrics_of_all_workers_are_summed(model_dir: Path, google: ModuleType) -> None:
    with run_server(TWO_WORKERS, f"--model_dir={model_dir}") as server:

        def send_requests(count: int) -> None:
            server.predict(make_v1_request(CAT))
            server.predict("{")
            with grpc.insecure_channel(server.grpc_address) as channel:
                call_grpc(channel, google, "ModelInfer", make_image_request(google, CAT))

        with ThreadPoolExecutor(4) as clients:
            list(clients.map(send_requests, range(12)))

        for _ in range(6):  # whichever worker answers
            assert requests_by_outcome(server) == {
                ("v1", "answered"): 12,
                ("v1", "invalid"): 12,
                ("grpc", "answered"): 12,
            }
            assert metric_value(server, "pinnace_stage_seconds_count", stage="infer") == 24
            assert metric_value(server, "pinnace_requests_in_flight") == 0
            assert metric_value(server, "pinnace_model_ready", model_name="custom-model") == 1
