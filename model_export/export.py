"""Conversion of a torch model to a directory that the server loads: an ONNX file and the weights file it refers to."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir
import torch

from model_export.errors import OutputError
from model_export.source import Source
from model_export.torchvision_compat import torchvision
from pinnace.models.model_card import ModelCard
from pinnace.models.storage import CHECKSUMS
from pinnace.runtimes.onnx import load_onnxruntime

OPSET = 20
MODEL_FILE = "model.onnx"
WEIGHTS_SUFFIX = ".weights"


def make_card(source: Source) -> ModelCard:
    """Return the card of the model in FP32: what a server must know to preprocess and label, and its provenance."""
    preset = source.preset
    return ModelCard(
        architecture=source.architecture,
        weights=source.weights,
        weights_sha256=source.weights_sha256,
        precision="fp32",
        resize_pixels=preset.resize_size[0],
        crop_pixels=preset.crop_size[0],
        interpolation=preset.interpolation.name,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        labels=source.labels,
        opset=OPSET,
        versions={
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": load_onnxruntime().__version__,
        },
    )


def convert(source: Source, card: ModelCard) -> onnx_ir.Model:
    """Return the model in ONNX, with `card` in its metadata.

    Its input is `pixels`, FP32 [rows, 3, crop, crop]; its output is `logits`, FP32 [rows, labels]. `rows` is dynamic.
    """
    example = torch.zeros(2, 3, card.crop_pixels, card.crop_pixels)
    rows = torch.export.Dim("rows", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own internals
        program = torch.onnx.export(
            source.model,
            (example,),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: rows},),
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = remove_identity_pools(program.model)
    model.metadata_props.update(card.to_properties())
    return model


def remove_identity_pools(model: onnx_ir.Model) -> onnx_ir.Model:
    """Remove average pools whose window is a single value, in place, and return the model.

    AlexNet and VGG have such a pool at the crop size of their weights. In int8 ONNX Runtime spends 3 % of AlexNet's
    time in it, on one core (measured).
    """
    for node in model.graph:
        if node.op_type != "AveragePool" or not (values := node.inputs[0]):
            continue
        kernel, strides = (node.attributes.get_ints(name, ()) for name in ("kernel_shape", "strides"))
        if {*kernel, *strides} == {1}:  # it has no padding: ONNX Runtime rejects padding for a window of one value
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], values)
            model.graph.remove(node)
    return model


def write_model(model: onnx_ir.Model, card: ModelCard, output: Path, check: Callable[[Path], None]) -> Path:
    """Write the model to the directory `output` if `check` accepts it, and return the path of the ONNX file.

    `check` gets a temporary directory with the same files; it raises to reject the model, and nothing is replaced.

    The model is replaced atomically. The weights file is named by its content and moved first; renaming the ONNX file,
    which refers to it, then switches from the old model to the new one. A killed export leaves a directory whose name
    begins with a dot, or a weights file to which no model refers.

    Raises OutputError if the files cannot be written.
    """
    try:
        return _write_files(model, card, output, check)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"cannot write the model to {output}: {reason}; choose a writable directory with --output"
        ) from error


def _write_files(model: onnx_ir.Model, card: ModelCard, output: Path, check: Callable[[Path], None]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    weights_file = f"{card.architecture}-{card.precision}-{card.weights_sha256[:12]}{WEIGHTS_SUFFIX}"
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as scratch:
        onnx_ir.save(model, Path(scratch) / MODEL_FILE, external_data=weights_file)
        check(Path(scratch))
        (Path(scratch) / CHECKSUMS).write_text(_checksums(Path(scratch), (weights_file, MODEL_FILE)))
        (output / CHECKSUMS).unlink(missing_ok=True)  # it must never describe another model than the present one
        for name in (weights_file, MODEL_FILE, CHECKSUMS):
            path = Path(scratch) / name
            path.chmod(0o644)
            os.replace(path, output / name)
    for path in output.glob(f"*{WEIGHTS_SUFFIX}"):
        if path.name != weights_file:
            path.unlink()
    return output / MODEL_FILE


def _checksums(directory: Path, names: Sequence[str]) -> str:
    """Return the lines that `sha256sum` prints. A server that downloads the model verifies it with them."""
    lines = []
    for name in names:
        with (directory / name).open("rb") as content:
            lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)
