"""ONNX models on the CPU or on CUDA: sessions that map named arrays to named arrays."""

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
from pinnace.memory import is_out_of_memory, trim_malloc
from pinnace.runtimes.shared_weights import shared_model

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
FATAL = 4
MIB = 1024 * 1024
NVIDIA_SMI_TIMEOUT_SECONDS = 30
PREPACKED_WEIGHTS = "weights.data"
MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay in the .onnx file
NO_CUDA = "--device=cuda, but CUDA is not available: {}; --device=auto uses the CPU instead"
NO_MEMORY = "not enough memory to load {} ({}): raise the memory limit, or serve a smaller model"


def load_onnxruntime() -> Any:
    """Import ONNX Runtime, with its telemetry off, and return the module. Raises PackageMissing and ModelLoadError."""
    # ONNX Runtime sends usage data to its developers (since 1.29 on Linux too) unless this is set before its import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        if is_out_of_memory(error):
            raise ModelLoadError(NO_MEMORY.format("ONNX Runtime", one_line(error))) from error
        raise PackageMissing(
            f"ONNX Runtime cannot be imported ({one_line(error)}): run `pip install 'pinnace[cpu]'`, or "
            "`pip install 'pinnace[gpu]'` for an NVIDIA GPU"
        ) from error


class OnnxSession:
    """A loaded ONNX model. Weights in a file beside the model are mapped into memory. `run` is thread-safe.

    Attributes:
        device: "cpu" or "cuda", where the model runs.
        metadata: The custom metadata of the .onnx file.
    """

    def __init__(self, model_path: Path | None, device: str, threads: int, gpu_memory_percent: int = 100) -> None:
        """Load the model.

        Args:
            model_path: An .onnx file, or a directory with exactly one.
            device: "auto", "cpu" or "cuda".
            threads: The number of threads that compute a run; 0 takes the CPU quota. (ONNX Runtime's own default is
                the number of the host's CPUs.)
            gpu_memory_percent: The share of the GPU's memory that the session may use.

        Raises:
            PackageMissing: ONNX Runtime is not installed.
            ModelFileNotFound: `model_path` is None, or a directory without exactly one .onnx file.
            ModelLoadError: ONNX Runtime cannot load the file.
            DeviceUnavailable: CUDA is required and not available.
        """
        onnxruntime = load_onnxruntime()
        file = _model_file(model_path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cpus()
        options.inter_op_num_threads = 1
        # Spinning is disabled: between runs it costs 20 % more CPU. Spinning only within a run gains 3 % (fp32, idle
        # cores), but on busy cores a single int8 request takes half as long again (measured).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Prepacking stays enabled. Without it a session starts in 0.06 s instead of 0.7 s and shares its weights with
        # other processes, but batches take a third longer, and the last bits of a row's result depend on the number of
        # rows in its batch (measured).
        options.log_severity_level = FATAL  # errors are raised as exceptions, and logged by the callers
        providers = _providers(device, gpu_memory_percent)
        shared = shared_model(file, write_prepacked_model) if providers == [CPU] else None
        if shared:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(shared or file), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            if is_out_of_memory(error):
                raise ModelLoadError(NO_MEMORY.format(file, one_line(error))) from error
            raise ModelLoadError(f"{file} cannot be loaded ({one_line(error)}); export the model again") from error
        trim_malloc()
        self.device = "cuda" if self._session.get_providers()[0] == CUDA else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise DeviceUnavailable(NO_CUDA.format("it failed to start, see the driver and the CUDA libraries"))
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self._outputs = [output.name for output in self._session.get_outputs()]
        weights = ", weights shared by the workers" if shared else ""
        logger.info("%s runs on %s, %d threads%s", file.name, self.device, options.intra_op_num_threads, weights)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the model on an array for every input. Return an array for every output.

        The first dimension of all arrays is the number of rows.
        """
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def write_prepacked_model(model_path: Path, prepacked_path: Path) -> None:
    """Write a copy of the model that is optimized for this CPU, with its prepacked weights in a file beside it.

    A session loads the copy without optimizing it again.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.optimized_model_filepath = str(prepacked_path)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", PREPACKED_WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(MIN_EXTERNAL_BYTES)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    onnxruntime.InferenceSession(str(model_path), options, providers=[CPU])


def _model_file(model_path: Path | None) -> Path:
    if model_path is None:
        raise ModelFileNotFound(
            "no model in /mnt/models nor in model/: export one with `pinnace export`, in a clone `make model`, or name "
            "one with --model_dir"
        )
    if not model_path.is_dir():
        return model_path
    files = [path for path in model_path.glob("*.onnx") if not path.name.startswith(".")]
    if len(files) != 1:
        found = ", ".join(sorted(path.name for path in files)) or "none"
        raise ModelFileNotFound(f"{model_path} must hold exactly one .onnx file, and holds {found}: see --model_dir")
    return files[0]


def gpu_memory_bytes(percent: int) -> int:
    """Return a share of the memory of this process's GPU, which nvidia-smi reports. Raises DeviceUnavailable."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible.partition(',')[0]}")
    try:
        completed = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=True
        )
        return int(completed.stdout.split()[0]) * MIB * percent // 100
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
    onnxruntime.preload_dlls()  # CUDA libraries installed by pip are not on the library path
    if gpu_memory_percent == 100:
        return [CUDA, CPU]
    return [(CUDA, {"gpu_mem_limit": gpu_memory_bytes(gpu_memory_percent)}), CPU]
