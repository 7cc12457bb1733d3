"""Smaller forms of an exported model, weights in half precision or all in 8 bits, and how wrong they are."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from model_export.errors import BadRequest, Mismatch
from model_export.export import write
from model_export.verify import photographs
from pinnace.models.classifier import Classifier
from pinnace.models.image import SIGNATURES
from pinnace.models.model_card import ModelCard
from pinnace.predictor import Request
from pinnace.runtimes.onnx import load_onnxruntime
from pinnace.settings import Settings
from pinnace.tensors import tensor_of_values

WORTH_HALVING_BYTES = 4096  # biases stay exact
LEAST_COSINE = {"fp16": 0.9999, "int8": 0.99}  # of an image's logits with those in fp32


def images(folder: Path | None) -> tuple[list[bytes], str]:
    """Every picture in the folder, else the photographs of `verify`; and what they are. Raises BadRequest."""
    if folder is None:
        paths = photographs()
        return [path.read_bytes() for path in paths], f"{len(paths)} photographs of scikit-image"
    found = [path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()]
    pictures = [data for data in found if data.startswith(SIGNATURES)]
    if not pictures:
        raise BadRequest(f"--calibration={folder} has no pictures")
    return pictures, f"{len(pictures)} pictures of --calibration"


def quantize(
    model: onnx_ir.Model, card: ModelCard, exact: Path, precision: str, pictures: Sequence[bytes], origin: str
) -> tuple[onnx_ir.Model, ModelCard]:
    """The model, which lies exported in `exact`, in another precision; its card has the error. Raises Mismatch."""
    made = to_half(model) if precision == "fp16" else to_int8(exact, pictures)
    card = replace(card, precision=precision)
    made.metadata_props.update(card.to_properties())
    with tempfile.TemporaryDirectory() as scratch:
        write(made, card, Path(scratch), lambda _: None)
        found = {"images": origin, **error(exact, Path(scratch), pictures)}
    if not found["cosine_min"] >= LEAST_COSINE[precision]:
        raise Mismatch(f"{precision} is too far from fp32: {in_words(found)}; another --calibration may help")
    card = replace(card, precision_error=found)
    made.metadata_props.update(card.to_properties())
    return made, card


def in_words(found: Mapping[str, Any]) -> str:
    return (
        f"{found['images']}: cosine of the logits {found['cosine_min']:.4f} at least, relative L2 "
        f"{found['relative_l2_max']:.3f} at most; the best class agrees on {found['top1_agreement']:.0%}, "
        f"the five best to {found['top5_agreement']:.0%}"
    )


def to_half(model: onnx_ir.Model) -> onnx_ir.Model:
    """The same with its weights stored in FP16; each is cast to FP32 as it is loaded, so a CPU computes as ever."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.nbytes < WORTH_HALVING_BYTES:
            continue
        with np.errstate(over="ignore"):  # what FP16 cannot hold shows in the error
            half = onnx_ir.tensor(tensor.numpy().astype(np.float16), name=f"{name}_half")
        stored = onnx_ir.Value(name=half.name, type=onnx_ir.TensorType(half.dtype), shape=value.shape, const_value=half)
        cast = onnx_ir.node("Cast", [stored], attributes={"to": onnx_ir.DataType.FLOAT})
        cast.outputs[0].name = f"{name}_single"
        onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(name)
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)
    return model


def to_int8(directory: Path, pictures: Sequence[bytes]) -> onnx_ir.Model:
    """The model of an export's directory in static QDQ form, weights per channel, calibrated on `pictures`."""
    load_onnxruntime()  # with its telemetry off
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Pixels(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = _rows(directory, pictures)

        def get_next(self) -> Mapping[str, NDArray[np.float32]] | None:
            return next(self._rows, None)

    with tempfile.TemporaryDirectory() as scratch:
        quantized = Path(scratch) / "model.onnx"
        logging.disable(logging.WARNING)  # it advises a preparation that torch's exporter has done
        try:
            quantize_static(
                directory / "model.onnx",
                quantized,
                Pixels(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return pretranspose_gemm_weights(onnx_ir.from_proto(onnx.load(quantized)))


def pretranspose_gemm_weights(model: onnx_ir.Model) -> onnx_ir.Model:
    """The same, with the 8-bit matrices of its linear layers stored as they are multiplied with, not transposed.

    ONNX Runtime would transpose them at each load, in memory that it keeps: 36 MiB of AlexNet (measured).
    """
    for node in model.graph:
        if node.op_type != "Gemm" or not node.attributes.get_int("transB", 0):
            continue
        matrix = node.inputs[1]
        scale = matrix.producer() if matrix else None
        stored = scale.inputs[0] if scale else None
        if not matrix or not scale or not stored or not stored.const_value or len(matrix.uses()) > 1:
            continue
        turned = np.ascontiguousarray(stored.const_value.numpy().T)
        stored.const_value, stored.shape = onnx_ir.tensor(turned, name=stored.name), onnx_ir.Shape(turned.shape)
        scale.attributes["axis"] = onnx_ir.AttrInt64("axis", 1)
        node.attributes["transB"] = onnx_ir.AttrInt64("transB", 0)
    return model


def error(exact: Path, made: Path, pictures: Sequence[bytes]) -> dict[str, Any]:
    """How far the logits of the model in `made` are from those of the one in `exact`: the worst and the mean image."""
    prepared = list(_rows(exact, pictures))
    expected, found = _logits(exact, prepared), _logits(made, prepared)
    with np.errstate(all="ignore"):  # not-a-number is an answer here: the worst
        cosine = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
        relative = np.linalg.norm(expected - found, axis=1) / np.linalg.norm(expected, axis=1)
    best, also = np.argsort(-expected, axis=1)[:, :5], np.argsort(-found, axis=1)[:, :5]
    common = [len(set(one) & set(other)) / best.shape[1] for one, other in zip(best, also, strict=True)]
    return {
        "cosine_min": float(cosine.min()),
        "cosine_mean": float(cosine.mean()),
        "relative_l2_max": float(relative.max()),
        "relative_l2_mean": float(relative.mean()),
        "top1_agreement": float((best[:, 0] == also[:, 0]).mean()),
        "top5_agreement": float(np.mean(common)),
    }


def _classifier(directory: Path) -> Classifier:
    classifier = Classifier(Settings(device="cpu"), directory)
    classifier.load()
    return classifier


def _rows(directory: Path, pictures: Sequence[bytes]) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Each image as the server prepares it."""
    classifier = _classifier(directory)
    for image in pictures:
        yield classifier.preprocess(Request("model", (tensor_of_values("image", "BYTES", [1], [image]),)))


def _logits(directory: Path, prepared: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[np.float32]:
    classifier = _classifier(directory)
    return np.concatenate([classifier.predict(rows)["logits"] for rows in prepared])
