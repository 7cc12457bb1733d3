"""From torch to a directory that the server loads: one ONNX file, and one file of weights that it maps."""

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

from model_export.source import Source
from model_export.vision import torchvision
from pinnace.models.model_card import ModelCard
from pinnace.models.storage import CHECKSUMS
from pinnace.runtimes.onnx import load_onnxruntime

OPSET = 20
MODEL_FILE = "model.onnx"
WEIGHTS_SUFFIX = ".weights"


def make_card(source: Source) -> ModelCard:
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
    """`pixels` FP32 [rows, 3, crop, crop] to `logits` FP32 [rows, labels], with any number of rows."""
    example = torch.zeros(2, 3, card.crop_pixels, card.crop_pixels)
    rows = torch.export.Dim("rows", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own insides
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
    """The same without average pools of one value each, which AlexNet's and VGG's are at the crop of their weights.

    In 8 bits ONNX Runtime takes 3 % of AlexNet's time for its own, on one core (measured).
    """
    for node in model.graph:
        if node.op_type != "AveragePool" or not (values := node.inputs[0]):
            continue
        kernel, strides = (node.attributes.get_ints(name, ()) for name in ("kernel_shape", "strides"))
        if {*kernel, *strides} == {1}:  # such a pool cannot be padded: ONNX Runtime refuses it
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], values)
            model.graph.remove(node)
    return model


def write(model: onnx_ir.Model, card: ModelCard, output: Path, check: Callable[[Path], None]) -> Path:
    """Put the model into the directory `output` once `check` has accepted it, and return its file.

    `check` is called with a directory of the same files, and raises. At every moment `output` holds the old model,
    whole, or the new one: weights are named by their content and come first, and the one rename of the ONNX file that
    refers to them decides. What a killed export leaves begins with a dot, or is weights that nobody refers to.
    """
    output.mkdir(parents=True, exist_ok=True)
    weights_file = f"{card.architecture}-{card.precision}-{card.weights_sha256[:12]}{WEIGHTS_SUFFIX}"
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as scratch:
        onnx_ir.save(model, Path(scratch) / MODEL_FILE, external_data=weights_file)
        check(Path(scratch))
        (Path(scratch) / CHECKSUMS).write_text(_checksums(Path(scratch), (weights_file, MODEL_FILE)))
        (output / CHECKSUMS).unlink(missing_ok=True)  # never of another model than the one that is there
        for name in (weights_file, MODEL_FILE, CHECKSUMS):
            path = Path(scratch) / name
            path.chmod(0o644)
            os.replace(path, output / name)
    for stale in output.glob(f"*{WEIGHTS_SUFFIX}"):
        if stale.name != weights_file:
            stale.unlink()
    return output / MODEL_FILE


def _checksums(directory: Path, names: Sequence[str]) -> str:
    """As `sha256sum` prints them: what a server that downloads the model verifies it by."""
    lines = []
    for name in names:
        with (directory / name).open("rb") as content:
            lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)
