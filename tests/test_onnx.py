"""pinnace/runtimes/onnx.py: the model file, the device, the number of threads, and the errors."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pinnace.cpus import available_cpus
from pinnace.errors import DeviceUnavailable, ModelFileNotFound, ModelLoadError
from pinnace.runtimes.onnx import OnnxSession, gpu_memory_bytes
from tests.support.cuda import HAS_CUDA
from tests.support.servers import PROJECT

PIXELS = np.zeros((1, 3, 224, 224), np.float32)


@pytest.fixture
def model_copy(model_dir: Path, tmp_path: Path) -> Path:
    """Copy the model, so that a test may damage it."""
    return shutil.copytree(model_dir, tmp_path / "model")


def test_a_model_is_loaded_from_a_directory_with_one_onnx_file_or_from_the_file(model_dir: Path) -> None:
    from_directory = OnnxSession(model_dir, "cpu", 1).run({"pixels": PIXELS})
    from_file = OnnxSession(model_dir / "model.onnx", "cpu", 1).run({"pixels": PIXELS})

    assert from_directory.keys() == {"logits"}
    np.testing.assert_array_equal(from_directory["logits"], from_file["logits"])


def test_the_default_number_of_threads_is_the_cpu_quota(model_dir: Path) -> None:
    def count_started_threads(threads: int) -> int:
        gc.collect()  # ends the threads of sessions of earlier tests
        before = len(os.listdir("/proc/self/task"))
        session = OnnxSession(model_dir, "cpu", threads)
        started = len(os.listdir("/proc/self/task")) - before
        return started + (session.device == "cpu")  # the caller's thread computes too

    assert count_started_threads(0) == available_cpus()
    assert count_started_threads(5) == 5


def test_auto_takes_the_cpu_without_a_gpu_and_logs_it(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    if HAS_CUDA:
        pytest.skip("this onnxruntime has CUDA, and this test is for one without")
    with caplog.at_level("INFO"):
        assert OnnxSession(model_dir, "auto", 2).device == "cpu"

    assert caplog.messages == ["model.onnx runs on cpu, 2 threads"]


def test_device_cuda_without_a_gpu_is_an_error(model_dir: Path) -> None:
    if HAS_CUDA:
        pytest.skip("this onnxruntime has CUDA, and this test is for one without")
    with pytest.raises(
        DeviceUnavailable, match=r"install 'pinnace\[gpu\]' in its place; --device=auto uses the CPU instead$"
    ):
        OnnxSession(model_dir, "cuda", 1)


def test_cuda_gives_the_logits_of_the_cpu(model_dir: Path) -> None:
    if not HAS_CUDA:
        pytest.skip("no CUDA in this onnxruntime: on a GPU this compares its logits with the CPU's, within 1e-2")
    random = np.random.default_rng(0).standard_normal((4, 3, 224, 224)).astype(np.float32)

    on_cuda = OnnxSession(model_dir, "cuda", 1).run({"pixels": random})["logits"]

    np.testing.assert_allclose(on_cuda, OnnxSession(model_dir, "cpu", 1).run({"pixels": random})["logits"], atol=1e-2)


def test_the_error_of_a_missing_model_names_the_searched_paths() -> None:
    searched = r"^no model in /mnt/models nor in model/: export one with `pinnace export`"
    with pytest.raises(ModelFileNotFound, match=searched):
        OnnxSession(None, "cpu", 1)


def test_the_error_of_a_directory_without_or_with_two_models_lists_them(model_copy: Path) -> None:
    shutil.copy(model_copy / "model.onnx", model_copy / "other.onnx")
    with pytest.raises(ModelFileNotFound, match=r"exactly one \.onnx file, and holds model\.onnx, other\.onnx"):
        OnnxSession(model_copy, "cpu", 1)

    for file in model_copy.glob("*.onnx"):
        file.unlink()
    with pytest.raises(ModelFileNotFound, match=r"exactly one \.onnx file, and holds none"):
        OnnxSession(model_copy, "cpu", 1)


def test_a_hidden_file_is_ignored(model_copy: Path) -> None:
    shutil.copy(model_copy / "model.onnx", model_copy / ".old.onnx")

    assert OnnxSession(model_copy, "cpu", 1).device == "cpu"


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut weights", "no weights"])
def test_a_damaged_model_is_an_error_of_one_line(damage: str, model_copy: Path) -> None:
    (weights,) = model_copy.glob("*.weights")
    if damage == "garbage":
        (model_copy / "model.onnx").write_bytes(os.urandom(1000))
    elif damage == "empty":
        (model_copy / "model.onnx").write_bytes(b"")
    elif damage == "cut weights":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        weights.unlink()

    with pytest.raises(ModelLoadError) as error:
        OnnxSession(model_copy, "cpu", 1)

    assert str(error.value).startswith(f"{model_copy}/model.onnx cannot be loaded (")
    assert str(error.value).endswith("; export the model again")
    assert "\n" not in str(error.value)


LOAD_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from pinnace.errors import ModelLoadError
from pinnace.runtimes.onnx import OnnxSession, load_onnxruntime

if sys.argv[3] == "loaded":
    load_onnxruntime()
used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit_bytes = used_bytes + int(sys.argv[2]) * 1024 * 1024
resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
try:
    OnnxSession(Path(sys.argv[1]), "cpu", 1)
except ModelLoadError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("free_mib", "runtime", "what"),
    [(2, "not loaded", "ONNX Runtime"), (40, "loaded", "model.onnx"), (300, "loaded", "model.onnx")],
)
def test_a_lack_of_memory_is_not_blamed_on_the_model(free_mib: int, runtime: str, what: str, model_dir: Path) -> None:
    command = [sys.executable, "-c", LOAD_WITH_LITTLE_MEMORY, str(model_dir), str(free_mib), runtime]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    assert done.stdout.startswith("not enough memory to load "), done
    assert what in done.stdout
    assert "export" not in done.stdout


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an nvidia-smi that answers for GPU 1 on the PATH, and select that GPU as Ray does."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=1 ] && echo 81559\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    return tool


def test_gpu_memory_percent_is_relative_to_the_total_memory(nvidia: Path) -> None:
    assert gpu_memory_bytes(50) == 81559 * 2**20 // 2


def test_gpu_memory_percent_without_a_gpu_is_an_error(nvidia: Path) -> None:
    nvidia.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(DeviceUnavailable, match="--gpu_memory_percent=50 needs nvidia-smi: "):
        gpu_memory_bytes(50)


def test_two_models_share_a_gpu(model_dir: Path) -> None:
    if not HAS_CUDA:
        pytest.skip("no CUDAExecutionProvider in this onnxruntime: on a GPU this loads two models of half its memory")
    sessions = [OnnxSession(model_dir, "cuda", 1, gpu_memory_percent=50) for _ in range(2)]

    first, second = (session.run({"pixels": PIXELS})["logits"] for session in sessions)
    np.testing.assert_array_equal(first, second)
