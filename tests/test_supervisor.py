"""pinnace/supervisor.py: several processes that look like one server."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import grpc
import pytest

from bench.server_process import children
from tests.conftest import grpc_call
from tests.pictures import CAT, v1_request
from tests.servers import Server, gated, is_alive, read_until, running, start_failing, wait_for
from tests.test_grpc import image_request
from tests.test_lifecycle import grpc_infer, rest
from tests.test_metrics import ended, value

WORKERS = 2
PREDICT = b"/v1/models/custom-model:predict"
TWO = f"--workers={WORKERS}"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Server]:
    """Two workers that say who they are; a new one needs the file to load."""
    (tmp_path / "model").write_text("")
    with running(TWO, "--predictor=tests.predictors:ProcessId", f"--model_dir={tmp_path}") as server:
        workers(server)
        yield server


def answered_by(server: Server) -> int:
    """The process that one request, on a connection of its own, reached."""
    (process_id,) = server.predict('{"instances": [0]}').json()["predictions"]
    return int(process_id)


def answering(server: Server) -> set[int]:
    """Processes that answer now; several requests at once, since one alone may always find the same."""
    with ThreadPoolExecutor(8) as clients:
        return set(clients.map(lambda _: answered_by(server), range(16)))


def workers(server: Server) -> set[int]:
    """Its processes, once each has answered: on a busy machine one of them may take all requests for a while."""
    found: set[int] = set()

    def all_answer() -> bool:
        found.clear()
        found.update(answering(server))
        return len(found) == WORKERS

    wait_for(all_answer)
    return found


def is_stopped(process_id: int) -> bool:
    return ") T " in Path(f"/proc/{process_id}/stat").read_text()


def test_both_ports_are_answered_by_all_workers_and_by_nobody_else(two: Server, google: ModuleType) -> None:
    reached = workers(two)

    seen: set[int] = set()

    def all_seen() -> bool:
        seen.add(grpc_infer(two, google, "0").outputs[0].contents.int64_contents[0])
        return seen == reached

    wait_for(all_seen)
    assert two.process.pid not in reached


def test_a_worker_that_wakes_first_leaves_connections_for_the_other(two: Server) -> None:
    first, second = workers(two)
    body = b'{"instances": [1]}'
    request = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (PREDICT, len(body)) + body
    with ExitStack() as stack:
        for process_id in (first, second):
            stack.callback(os.kill, process_id, signal.SIGCONT)
            os.kill(process_id, signal.SIGSTOP)
            wait_for(partial(is_stopped, process_id))
        connections = [stack.enter_context(two.connect()) for _ in range(64)]
        for connection in connections:
            connection.sendall(request)
        os.kill(first, signal.SIGCONT)
        wait_for(partial(is_stopped, first))  # by its first prediction, with as many connections as it took till then
        os.kill(second, signal.SIGCONT)
        wait_for(partial(is_stopped, second))  # by a connection that was left
        for process_id in (first, second):
            os.kill(process_id, signal.SIGCONT)
        answers = {read_until(connection, b"]}").rpartition(b"[")[2] for connection in connections}

    assert answers == {b"%d]}" % first, b"%d]}" % second}


def test_a_killed_worker_is_replaced_and_meanwhile_the_other_answers(two: Server) -> None:
    killed, other = workers(two)

    os.kill(killed, signal.SIGKILL)
    two.wait_for_line(re.compile(r"worker \d ended, exit code 137: another starts in 0\.5 s"))
    assert {answered_by(two) for _ in range(10)} == {other}
    assert killed not in workers(two)


def test_a_worker_that_leaves_a_process_behind_is_replaced_as_well(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with running(TWO, "--predictor=tests.predictors:Forking", f"--model_dir={tmp_path}") as server:
        killed, _ = workers(server)
        os.kill(killed, signal.SIGKILL)
        server.wait_for_line(re.compile(r"worker \d ended, exit code 137: another starts in 0\.5 s"))
        assert killed not in workers(server)
        for child in tmp_path.glob("child-*"):
            os.kill(int(child.name.removeprefix("child-")), signal.SIGKILL)
        assert server.stop() == 0


def test_workers_that_are_signalled_beside_their_supervisor_answer_what_they_accepted(
    tmp_path: Path, gate: Callable[[str], Path]
) -> None:
    held = gate("held")
    with gated(tmp_path, TWO) as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(rest, server, "held")
        with held.open("wb"):
            for process_id in (server.process.pid, *children(server.process.pid)):
                with suppress(ProcessLookupError):  # the other one, which has nothing to answer
                    os.kill(process_id, signal.SIGTERM)
            wait_for(partial(is_refused, server))
        assert answer.result().status_code == 200
        assert server.wait() == 0


def is_refused(server: Server) -> bool:
    try:
        server.connect().close()
    except ConnectionError as error:  # reset, in the moment of the close
        return isinstance(error, ConnectionRefusedError)
    return False


def test_a_worker_that_cannot_start_again_is_tried_ever_more_slowly(two: Server, tmp_path: Path) -> None:
    killed, other = workers(two)
    (tmp_path / "model").rename(tmp_path / "elsewhere")

    os.kill(killed, signal.SIGKILL)
    two.wait_for_line(re.compile(r"worker \d ended, exit code 7: another starts in 1\.0 s"))
    two.wait_for_line(re.compile(r"worker \d ended, exit code 7: another starts in 2\.0 s"))
    assert answering(two) == {other}

    (tmp_path / "elsewhere").rename(tmp_path / "model")
    assert len(workers(two)) == WORKERS
    assert two.stop() == 0


def test_a_worker_for_which_the_system_has_nothing_left_is_tried_again(two: Server) -> None:
    killed, other = workers(two)
    _, most = resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE, (3, most))

    os.kill(killed, signal.SIGKILL)
    two.wait_for_line(re.compile(r"worker \d cannot be started: .*Too many open files"))
    assert answering(two) == {other}

    resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE, (most, most))
    assert len(workers(two)) == WORKERS
    assert two.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_answers_what_every_worker_has_accepted(
    number: signal.Signals, tmp_path: Path, gate: Callable[[str], Path], google: ModuleType
) -> None:
    gates = [gate(f"gate{count}") for count in range(4)]
    with gated(tmp_path, TWO) as server, ThreadPoolExecutor(len(gates)) as clients:
        over_rest = [clients.submit(rest, server, path.name) for path in gates[:2]]
        over_grpc = [clients.submit(grpc_infer, server, google, path.name) for path in gates[2:]]
        held = [path.open("wb") for path in gates]
        server.process.send_signal(number)
        server.wait_for_line(re.compile("stopping: "))
        for file in held:
            file.close()

        assert [answer.result().status_code for answer in over_rest] == [200] * 2
        assert [len(answer.result().outputs) for answer in over_grpc] == [1] * 2
        assert server.wait() == 0


def test_a_worker_that_was_cut_gives_its_exit_code(tmp_path: Path, gate: Callable[[str], Path]) -> None:
    held = gate("held")
    with gated(tmp_path, TWO, "--grace_period_seconds=1") as server, ThreadPoolExecutor() as clients:
        clients.submit(rest, server, "held")
        with held.open("wb"):
            assert server.stop() == 8


def test_the_workers_end_when_their_supervisor_is_killed(two: Server) -> None:
    reached = workers(two)

    two.process.kill()

    wait_for(lambda: not any(is_alive(worker) for worker in reached))


def test_what_keeps_a_worker_from_starting_ends_the_server_with_the_workers_code(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")

    code, lines = start_failing(TWO, f"--model_dir={tmp_path}", "--http_port=0", "--grpc_port=0")

    assert code == 5
    assert any("cannot be loaded" in line for line in lines)


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_port_in_use_ends_the_start_before_any_worker(port: str) -> None:
    other = {"http_port": "grpc_port", "grpc_port": "http_port"}[port]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        code, (line,) = start_failing(TWO, f"--{port}={number}", f"--{other}=0")

    assert code == 3
    assert f"cannot listen on port {number}" in line


def test_a_port_that_a_running_server_shares_is_in_use(two: Server) -> None:
    code, _ = start_failing(TWO, "--http_port=0", f"--grpc_port={two.grpc_port}")

    assert code == 3


def test_the_metrics_of_all_workers_add_up_to_what_the_clients_sent(model_dir: Path, google: ModuleType) -> None:
    with running(TWO, f"--model_dir={model_dir}") as server:

        def one(count: int) -> None:
            server.predict(v1_request(CAT))
            server.predict("{")
            with grpc.insecure_channel(server.grpc_address) as channel:
                grpc_call(channel, google, "ModelInfer", image_request(google, CAT))

        with ThreadPoolExecutor(4) as clients:
            list(clients.map(one, range(12)))

        for _ in range(6):  # of whichever worker
            assert ended(server) == {("v1", "answered"): 12, ("v1", "invalid"): 12, ("grpc", "answered"): 12}
            assert value(server, "pinnace_stage_seconds_count", stage="infer") == 24
            assert value(server, "pinnace_requests_in_flight") == 0
            assert value(server, "pinnace_model_ready", model_name="custom-model") == 1
