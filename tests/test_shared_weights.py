"""pinnace/runtimes/shared_weights.py: one copy of the weights for all workers, on disk and in memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bench.server_process import children, memory_mib
from pinnace.runtimes.onnx import PREPACKED_WEIGHTS, OnnxSession, write_prepacked_model
from pinnace.runtimes.shared_weights import SHARED_WEIGHTS_ENV, shared_model
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT
from tests.support.servers import READY, TWO_WORKERS, Server, is_alive, run_server
from tests.support.waiting import wait_for


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory for shared weights, and let this process use it as a worker does."""
    monkeypatch.setenv(SHARED_WEIGHTS_ENV, str(tmp_path))
    return tmp_path


@contextmanager
def run_two_workers(*flags: str, temporary: Path) -> Iterator[Server]:
    with run_server(TWO_WORKERS, *flags, environment={**os.environ, "TMPDIR": str(temporary)}) as server:
        server.wait_for_line(READY)  # of the second worker
        yield server


@contextmanager
def limit_file_size(max_bytes: int) -> Iterator[None]:
    """Make writes beyond `max_bytes` of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_two_workers_share_one_copy_of_the_weights_and_give_the_answers_of_one(
    model_dir: Path, server: Server, tmp_path: Path
) -> None:
    weights_mib = sum(file.stat().st_size for file in model_dir.iterdir()) / 2**20
    with run_two_workers(f"--model_dir={model_dir}", temporary=tmp_path) as two:
        workers = children(two.process.pid)
        answers = {two.predict(make_v1_request(CAT)).text for _ in range(8)}
        own = [memory_mib(worker, "Anonymous") for worker in workers]
        maps = [Path(f"/proc/{worker}/maps").read_text() for worker in workers]

        assert two.stop() == 0

    assert answers == {server.predict(make_v1_request(CAT)).text}
    assert max(own) < weights_mib / 2
    assert [PREPACKED_WEIGHTS in text for text in maps] == [True, True]
    assert list(tmp_path.glob("pinnace-*")) == []


def test_a_single_worker_shares_no_weights(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARED_WEIGHTS_ENV, raising=False)

    assert shared_model(model_dir / "model.onnx", write_prepacked_model) is None


def test_workers_that_start_together_write_the_weights_once(model_dir: Path, folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: shared_model(model_dir / "model.onnx", write_prepacked_model), range(4)))

    (file,) = files
    assert file
    assert [path for path in folder.iterdir() if path.is_dir()] == [file.parent]


def test_a_prepacked_model_has_the_metadata_and_logits_of_the_original(model_dir: Path, folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3, 224, 224)).astype(np.float32)
    shared = OnnxSession(model_dir, "cpu", 1)
    os.environ.pop(SHARED_WEIGHTS_ENV)
    own = OnnxSession(model_dir, "cpu", 1)

    assert shared.metadata == own.metadata
    np.testing.assert_array_equal(shared.run({"pixels": rows})["logits"], own.run({"pixels": rows})["logits"])


def test_the_unfinished_files_of_a_killed_worker_are_replaced(model_dir: Path, folder: Path) -> None:
    file = shared_model(model_dir / "model.onnx", write_prepacked_model)
    assert file
    file.parent.rename(unfinished := file.parent.with_suffix(".part"))
    (unfinished / PREPACKED_WEIGHTS).write_bytes(b"")

    assert shared_model(model_dir / "model.onnx", write_prepacked_model) == file
    assert (file.parent / PREPACKED_WEIGHTS).stat().st_size > 0
    assert not unfinished.exists()


def test_on_a_full_disk_each_worker_has_its_own_weights_and_logs_a_warning(
    model_dir: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with limit_file_size(1024 * 1024), caplog.at_level("INFO"):
        session = OnnxSession(model_dir, "cpu", 1)

    assert session.run({"pixels": np.zeros((1, 3, 224, 224), np.float32)})["logits"].shape == (1, 1000)
    warning, loaded = caplog.messages
    assert warning.startswith("the workers do not share weights, each keeps its own copy in memory: ")
    assert loaded == "model.onnx runs on cpu, 1 threads"
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_workers_of_a_killed_supervisor_leave_no_files(model_dir: Path, tmp_path: Path) -> None:
    with run_two_workers(f"--model_dir={model_dir}", temporary=tmp_path) as two:
        workers = children(two.process.pid)

        two.process.kill()

        wait_for(lambda: not any(is_alive(worker) for worker in workers), "the end of the workers")
    assert list(tmp_path.glob("pinnace-*")) == []
