"""pinnace/engine.py: which file, which device, how many threads, and what is no model."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pinnace.cpus import available_cpus
from pinnace.errors import DeviceUnavailable, ModelFileNotFound, ModelLoadError
from pinnace.runtimes.onnx import CUDA, OnnxSession, gpu_memory_bytes

HAS_CUDA = CUDA in onnxruntime.get_available_providers()
PIXELS = np.zeros((1, 3, 224, 224), np.float32)


@pytest.fixture
def copy_dir(model_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "model")


def test_a_model_is_a_directory_with_one_onnx_file_or_the_file_itself(model_dir: Path) -> None:
    of_directory = OnnxSession(model_dir, "cpu", 1).run({"pixels": PIXELS})
    of_file = OnnxSession(model_dir / "model.onnx", "cpu", 1).run({"pixels": PIXELS})

    assert of_directory.keys() == {"logits"}
    np.testing.assert_array_equal(of_directory["logits"], of_file["logits"])


def test_the_models_threads_are_the_quotas_and_not_the_hosts(model_dir: Path) -> None:
    def threads_started(threads: int) -> int:
        gc.collect()  # threads of engines that earlier tests have left
        before = len(os.listdir("/proc/self/task"))
        engine = OnnxSession(model_dir, "cpu", threads)
        return len(os.listdir("/proc/self/task")) - before + (engine.device == "cpu")  # the caller's thread works too

    assert threads_started(0) == available_cpus()
    assert threads_started(5) == 5


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_so(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if HAS_CUDA:
        pytest.skip("this onnxruntime has CUDA: the test of auto without it says nothing here")
    with caplog.at_level("INFO"):
        assert OnnxSession(model_dir, "auto", 2).device == "cpu"

    assert caplog.messages == ["model.onnx runs on cpu, 2 threads"]


def test_cuda_that_cannot_be_had_is_an_error_where_it_was_demanded(model_dir: Path) -> None:
    if HAS_CUDA:
        pytest.skip("this onnxruntime has CUDA: the test of a demand without it says nothing here")
    with pytest.raises(DeviceUnavailable, match=r"install 'pinnace\[gpu\]' in its place; --device=auto takes the CPU "):
        OnnxSession(model_dir, "cuda", 1)


def test_cuda_answers_as_the_cpu_does(model_dir: Path) -> None:
    if not HAS_CUDA:
        pytest.skip("no CUDA in this onnxruntime: on a GPU this compares its logits with the CPU's, within 1e-2")
    random = np.random.default_rng(0).standard_normal((4, 3, 224, 224)).astype(np.float32)

    on_cuda = OnnxSession(model_dir, "cuda", 1).run({"pixels": random})["logits"]

    np.testing.assert_allclose(on_cuda, OnnxSession(model_dir, "cpu", 1).run({"pixels": random})["logits"], atol=1e-2)


def test_no_model_anywhere_says_where_it_was_looked_for() -> None:
    with pytest.raises(
        ModelFileNotFound, match=r"^no model in /mnt/models nor in model/: export one with `pinnace export`"
    ):
        OnnxSession(None, "cpu", 1)


def test_a_directory_without_or_with_two_models_says_what_it_holds(copy_dir: Path) -> None:
    shutil.copy(copy_dir / "model.onnx", copy_dir / "other.onnx")
    with pytest.raises(ModelFileNotFound, match=r"exactly one \.onnx file, and holds model\.onnx, other\.onnx"):
        OnnxSession(copy_dir, "cpu", 1)

    for file in copy_dir.glob("*.onnx"):
        file.unlink()
    with pytest.raises(ModelFileNotFound, match=r"exactly one \.onnx file, and holds none"):
        OnnxSession(copy_dir, "cpu", 1)


def test_a_hidden_file_is_no_model(copy_dir: Path) -> None:
    shutil.copy(copy_dir / "model.onnx", copy_dir / ".old.onnx")

    assert OnnxSession(copy_dir, "cpu", 1).device == "cpu"


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut weights", "no weights"])
def test_a_damaged_model_is_one_error_with_one_line(damage: str, copy_dir: Path) -> None:
    (weights,) = copy_dir.glob("*.weights")
    if damage == "garbage":
        (copy_dir / "model.onnx").write_bytes(os.urandom(1000))
    elif damage == "empty":
        (copy_dir / "model.onnx").write_bytes(b"")
    elif damage == "cut weights":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        weights.unlink()

    with pytest.raises(ModelLoadError) as error:
        OnnxSession(copy_dir, "cpu", 1)

    assert str(error.value).startswith(f"{copy_dir}/model.onnx cannot be loaded (")
    assert str(error.value).endswith("; export the model again")
    assert "\n" not in str(error.value)


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that answers for GPU 1, as Ray would choose it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=1 ] && echo 81559\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    return tool


def test_a_share_of_the_gpus_memory_is_one_of_all_that_it_has(nvidia: Path) -> None:
    assert gpu_memory_bytes(50) == 81559 * 2**20 // 2


def test_a_share_without_a_gpu_is_an_error_that_names_the_setting(nvidia: Path) -> None:
    nvidia.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(DeviceUnavailable, match="--gpu_memory_percent=50 needs nvidia-smi: "):
        gpu_memory_bytes(50)


def test_two_models_of_half_a_gpu_share_it(model_dir: Path) -> None:
    if not HAS_CUDA:
        pytest.skip("no CUDAExecutionProvider in this onnxruntime: on a GPU this loads two models of half its memory")
    engines = [OnnxSession(model_dir, "cuda", 1, gpu_memory_percent=50) for _ in range(2)]

    first, second = (engine.run({"pixels": PIXELS})["logits"] for engine in engines)
    np.testing.assert_array_equal(first, second)
