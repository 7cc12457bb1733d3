"""pinnace/shared_weights.py: the weights of several workers, once on disk and once in memory."""

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
from pinnace.runtimes.shared_weights import VARIABLE, shared_model
from tests.pictures import CAT, v1_request
from tests.servers import READY, Server, is_alive, running, wait_for
from tests.test_supervisor import TWO


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process finds what it shares, as if it were a worker."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


@contextmanager
def two_workers(*flags: str, temporary: Path) -> Iterator[Server]:
    with running(TWO, *flags, environment={**os.environ, "TMPDIR": str(temporary)}) as server:
        server.wait_for_line(READY)  # the other's
        yield server


@contextmanager
def files_no_larger_than(most_bytes: int) -> Iterator[None]:
    """As on a disk that is full after as many."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_two_workers_hold_the_weights_once_and_answer_as_one_does(
    model_dir: Path, server: Server, tmp_path: Path
) -> None:
    weights_mib = sum(file.stat().st_size for file in model_dir.iterdir()) / 2**20
    with two_workers(f"--model_dir={model_dir}", temporary=tmp_path) as two:
        workers = children(two.process.pid)
        answers = {two.predict(v1_request(CAT)).text for _ in range(8)}
        own = [memory_mib(worker, "Anonymous") for worker in workers]
        maps = [Path(f"/proc/{worker}/maps").read_text() for worker in workers]

        assert two.stop() == 0

    assert answers == {server.predict(v1_request(CAT)).text}
    assert max(own) < weights_mib / 2
    assert [PREPACKED_WEIGHTS in text for text in maps] == [True, True]
    assert list(tmp_path.glob("pinnace-*")) == []


def test_a_worker_alone_has_its_weights_for_itself(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)

    assert shared_model(model_dir / "model.onnx", write_prepacked_model) is None


def test_workers_that_start_at_once_prepare_the_weights_once(model_dir: Path, folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: shared_model(model_dir / "model.onnx", write_prepacked_model), range(4)))

    (file,) = files
    assert file
    assert [path for path in folder.iterdir() if path.is_dir()] == [file.parent]


def test_a_prepared_model_says_of_itself_what_the_original_says(model_dir: Path, folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3, 224, 224)).astype(np.float32)
    shared = OnnxSession(model_dir, "cpu", 1)
    os.environ.pop(VARIABLE)
    own = OnnxSession(model_dir, "cpu", 1)

    assert shared.metadata == own.metadata
    np.testing.assert_array_equal(shared.run({"pixels": rows})["logits"], own.run({"pixels": rows})["logits"])


def test_what_a_killed_worker_has_begun_is_made_anew(model_dir: Path, folder: Path) -> None:
    file = shared_model(model_dir / "model.onnx", write_prepacked_model)
    assert file
    file.parent.rename(begun := file.parent.with_suffix(".part"))
    (begun / PREPACKED_WEIGHTS).write_bytes(b"")

    assert shared_model(model_dir / "model.onnx", write_prepacked_model) == file
    assert (file.parent / PREPACKED_WEIGHTS).stat().st_size > 0
    assert not begun.exists()


def test_on_a_full_disk_each_worker_has_its_own_weights_and_says_so_once(
    model_dir: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with files_no_larger_than(1024 * 1024), caplog.at_level("INFO"):
        engine = OnnxSession(model_dir, "cpu", 1)

    assert engine.run({"pixels": np.zeros((1, 3, 224, 224), np.float32)})["logits"].shape == (1, 1000)
    warning, open_dataplane = caplog.messages
    assert warning.startswith("the workers share no weights, each has its own in memory: ")
    assert open_dataplane == "model.onnx runs on cpu, 1 threads"
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_workers_whose_supervisor_was_killed_leave_nothing_on_the_disk(model_dir: Path, tmp_path: Path) -> None:
    with two_workers(f"--model_dir={model_dir}", temporary=tmp_path) as two:
        workers = children(two.process.pid)

        two.process.kill()

        wait_for(lambda: not any(is_alive(worker) for worker in workers))
    assert list(tmp_path.glob("pinnace-*")) == []
