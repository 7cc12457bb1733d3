"""ONNX Runtime on the CPU or on CUDA: named arrays in, named arrays out."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pinnace.cpus import available_cpus
from pinnace.errors import DeviceUnavailable, ModelFileNotFound, ModelLoadError, PackageMissing, one_line
from pinnace.memory import trim_malloc
from pinnace.runtimes.shared_weights import shared_model

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
FATAL = 4
MIB = 1024 * 1024
NVIDIA_SMI_TIMEOUT_SECONDS = 30
PREPACKED_WEIGHTS = "weights.data"
MIN_EXTERNAL_BYTES = 1024  # what is smaller stays in the .onnx file
NO_CUDA = "--device=cuda, but CUDA cannot be had: {}; --device=auto takes the CPU instead"


def load_onnxruntime() -> Any:
    """Import ONNX Runtime, with its telemetry off, and return the module. Raises PackageMissing."""
    # ONNX Runtime sends usage data to its makers (from 1.29 on Linux too) unless this is set before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise PackageMissing(
            f"ONNX Runtime cannot be imported ({one_line(error)}): run `pip install 'pinnace[cpu]'`, or "
            "`pip install 'pinnace[gpu]'` for an NVIDIA GPU"
        ) from error


class OnnxSession:
    """One ONNX model, loaded, its weights mapped where they lie beside it.

    `run` may be called from several threads. Its own threads are counted from the CPU quota, since ONNX Runtime
    would count the host's. Raises PackageMissing, ModelFileNotFound, ModelLoadError and DeviceUnavailable.
    """

    def __init__(self, model: Path | None, device: str, threads: int, gpu_memory_percent: int = 100) -> None:
        """`model` is an .onnx file or a directory with one; `device` is auto, cpu or cuda; 0 threads is the quota."""
        onnxruntime = load_onnxruntime()
        file = _model_file(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cpus()
        options.inter_op_num_threads = 1
        # Threads that spin between runs take a fifth more CPU from decoding, for nothing. That spin within them alone
        # are worth 3 % of fp32 on free cores; where others want those, a lone int8 request takes half as long again.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Prepacking stays on. Without it a session starts in 0.06 s instead of 0.7 and shares its weights with other
        # processes, but batches take a third longer, and a row's last bits depend on how many run with it (measured).
        options.log_severity_level = FATAL  # what goes wrong is raised, and said once, by us
        providers = _providers(device, gpu_memory_percent)
        shared = shared_model(file, write_prepacked_model) if providers == [CPU] else None
        if shared:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(shared or file), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no class in common
            raise ModelLoadError(f"{file} cannot be loaded ({one_line(error)}); export the model again") from error
        trim_malloc()
        self.device = "cuda" if self._session.get_providers()[0] == CUDA else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise DeviceUnavailable(NO_CUDA.format("it did not start, see the driver and the CUDA libraries"))
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self._outputs = [output.name for output in self._session.get_outputs()]
        weights = ", weights shared by the workers" if shared else ""
        logger.info("%s runs on %s, %d threads%s", file.name, self.device, options.intra_op_num_threads, weights)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """An array for every input of the model, rows first, to an array for every output."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def write_prepacked_model(model: Path, prepared: Path) -> None:
    """Write `model` optimized for this CPU, prepacked weights beside it: to be loaded as it is."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.optimized_model_filepath = str(prepared)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", PREPACKED_WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(MIN_EXTERNAL_BYTES)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    onnxruntime.InferenceSession(str(model), options, providers=[CPU])


def _model_file(model: Path | None) -> Path:
    if model is None:
        raise ModelFileNotFound(
            "no model in /mnt/models nor in model/: export one with `pinnace export`, in a clone `make model`, or name "
            "one with --model_dir"
        )
    if not model.is_dir():
        return model
    files = [path for path in model.glob("*.onnx") if not path.name.startswith(".")]
    if len(files) != 1:
        found = ", ".join(sorted(path.name for path in files)) or "none"
        raise ModelFileNotFound(f"{model} must hold exactly one .onnx file, and holds {found}: see --model_dir")
    return files[0]


def gpu_memory_bytes(percent: int) -> int:
    """That share of all that the GPU of this process has, as NVIDIA's own tool counts it. Raises DeviceMissing."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible.partition(',')[0]}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=True)  # noqa: S603
        return int(done.stdout.split()[0]) * MIB * percent // 100
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise DeviceUnavailable(f"--gpu_memory_percent={percent} needs nvidia-smi: {one_line(error)}") from error


def _providers(device: str, gpu_memory_percent: int) -> list[str | tuple[str, dict[str, int]]]:
    if device == "cpu":
        return [CPU]
    onnxruntime = load_onnxruntime()
    if CUDA not in onnxruntime.get_available_providers():
        if device == "cuda":
            raise DeviceUnavailable(
                NO_CUDA.format("this onnxruntime is built without it, install 'pinnace[gpu]' in its place")
            )
        return [CPU]
    onnxruntime.set_default_logger_severity(FATAL)
    onnxruntime.preload_dlls()  # pip's CUDA libraries are on no library path
    if gpu_memory_percent == 100:
        return [CUDA, CPU]
    return [(CUDA, {"gpu_mem_limit": gpu_memory_bytes(gpu_memory_percent)}), CPU]
