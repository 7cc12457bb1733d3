"""Exported models in fp16 or int8: smaller than fp32, with a measured error."""

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

from model_export.errors import UsageError, VerificationError
from model_export.export import write_model
from model_export.verify import find_photographs
from pinnace.errors import InvalidInput, TooLarge
from pinnace.models.classifier import Classifier
from pinnace.models.image import decode
from pinnace.models.image_header import SIGNATURES
from pinnace.models.model_card import ModelCard
from pinnace.predictor import Request
from pinnace.runtimes.onnx import load_onnxruntime
from pinnace.settings import Settings
from pinnace.tensors import Tensor

MIN_FP16_BYTES = 4096  # smaller tensors, such as biases, stay in FP32
MIN_COSINE = {"fp16": 0.9999, "int8": 0.99}  # cosine similarity of an image's logits with fp32's


def read_calibration_images(directory: Path | None) -> tuple[list[bytes], str]:
    """Return the encoded images in the directory (None: scikit-image's photographs), and a phrase for their origin.

    Raises UsageError if the directory has no images, or a damaged one.
    """
    if directory is None:
        paths = find_photographs()
        return [path.read_bytes() for path in paths], f"{len(paths)} photographs of scikit-image"
    images = []
    for path in sorted(directory.glob("*")):
        try:
            data = path.read_bytes() if path.is_file() else b""
            if data.startswith(SIGNATURES):
                decode(data, Settings().max_image_pixels)
                images.append(data)
        except OSError as error:
            raise UsageError(f"--calibration={directory}: cannot read {path.name}: {error.strerror}") from error
        except (InvalidInput, TooLarge) as error:
            raise UsageError(f"--calibration={directory}: remove {path.name}, which is {error}") from error
    if not images:
        raise UsageError(f"--calibration={directory} has no images")
    return images, f"{len(images)} images of --calibration"


def quantize(
    model: onnx_ir.Model, card: ModelCard, fp32_dir: Path, precision: str, images: Sequence[bytes], origin: str
) -> tuple[onnx_ir.Model, ModelCard]:
    """Convert a model to fp16 or int8, and measure its error.

    Args:
        model: The model in FP32. It may be changed in place.
        card: Its card.
        fp32_dir: Directory of the same model, as `write_model` wrote it.
        precision: fp16 or int8.
        images: Encoded images to calibrate int8 and to measure the error on.
        origin: A phrase for the images; the card names it beside the error.

    Returns:
        The converted model, and its card with the measured error.

    Raises:
        VerificationError: The logits are too far from those in FP32.
    """
    converted = convert_to_fp16(model) if precision == "fp16" else convert_to_int8(fp32_dir, images)
    card = replace(card, precision=precision)
    converted.metadata_props.update(card.to_properties())
    with tempfile.TemporaryDirectory() as scratch:
        write_model(converted, card, Path(scratch), lambda _: None)
        error = {"images": origin, **measure_error(fp32_dir, Path(scratch), images)}
    if not error["cosine_min"] >= MIN_COSINE[precision]:
        raise VerificationError(
            f"{precision} is too far from fp32: {describe_error(error)}; try other images with --calibration"
        )
    card = replace(card, precision_error=error)
    converted.metadata_props.update(card.to_properties())
    return converted, card


def describe_error(error: Mapping[str, Any]) -> str:
    """Return the error that `measure_error` found, and the origin of its images, as a line of text."""
    return (
        f"error on {error['images']}: cosine similarity of the logits at least {error['cosine_min']:.4f}, relative L2 "
        f"error at most {error['relative_l2_max']:.3f}, top-1 agreement {error['top1_agreement']:.0%}, top-5 agreement "
        f"{error['top5_agreement']:.0%}"
    )


def convert_to_fp16(model: onnx_ir.Model) -> onnx_ir.Model:
    """Store the model's weights in FP16, in place, and return the model.

    A Cast converts each back to FP32 when the model is loaded, so the computation stays in FP32.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.nbytes < MIN_FP16_BYTES:
            continue
        with np.errstate(over="ignore"):  # values that overflow FP16 show in the measured error
            half = onnx_ir.tensor(tensor.numpy().astype(np.float16), name=f"{name}_half")
        stored = onnx_ir.Value(name=half.name, type=onnx_ir.TensorType(half.dtype), shape=value.shape, const_value=half)
        cast = onnx_ir.node("Cast", [stored], attributes={"to": onnx_ir.DataType.FLOAT})
        cast.outputs[0].name = f"{name}_single"
        onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(name)
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)
    return model


def convert_to_int8(fp32_dir: Path, images: Sequence[bytes]) -> onnx_ir.Model:
    """Return the model in `fp32_dir` in int8: static quantization (QDQ), weights per channel, calibrated on `images`.

    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    load_onnxruntime()  # without telemetry
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class ImageReader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = _preprocess(fp32_dir, images)

        def get_next(self) -> Mapping[str, NDArray[np.float32]] | None:
            return next(self._rows, None)

    with tempfile.TemporaryDirectory() as scratch:
        quantized = Path(scratch) / "model.onnx"
        logging.disable(logging.WARNING)  # it advises a pre-processing step that torch's exporter has already done
        try:
            quantize_static(
                fp32_dir / "model.onnx",
                quantized,
                ImageReader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return pretranspose_gemm_weights(onnx_ir.from_proto(onnx.load(quantized)))


def pretranspose_gemm_weights(model: onnx_ir.Model) -> onnx_ir.Model:
    """Transpose the int8 weights of linear layers (Gemm with transB=1) in place, and return the model.

    ONNX Runtime would transpose them at every load, into memory that it keeps: 36 MiB for AlexNet (measured).
    """
    for node in model.graph:
        if node.op_type != "Gemm" or not node.attributes.get_int("transB", 0):
            continue
        weights = node.inputs[1]
        dequantize = weights.producer() if weights else None
        stored = dequantize.inputs[0] if dequantize else None
        if not weights or not dequantize or not stored or not stored.const_value or len(weights.uses()) > 1:
            continue
        transposed = np.ascontiguousarray(stored.const_value.numpy().T)
        stored.const_value, stored.shape = onnx_ir.tensor(transposed, name=stored.name), onnx_ir.Shape(transposed.shape)
        dequantize.attributes["axis"] = onnx_ir.AttrInt64("axis", 1)
        node.attributes["transB"] = onnx_ir.AttrInt64("transB", 0)
    return model


def measure_error(fp32_dir: Path, converted_dir: Path, images: Sequence[bytes]) -> dict[str, Any]:
    """Compare the logits of the model in `converted_dir` with those of the model in `fp32_dir`, image by image.

    Returns:
        The cosine similarity of the logits (lowest and mean), their relative L2 error (highest and mean), the share of
        images with the same highest class, and the mean share of common classes among the five highest.
    """
    batches = list(_preprocess(fp32_dir, images))
    expected, actual = _predict_logits(fp32_dir, batches), _predict_logits(converted_dir, batches)
    with np.errstate(all="ignore"):  # the result may be NaN, which counts as too far
        cosine = (expected * actual).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(actual, axis=1)
        relative_l2 = np.linalg.norm(expected - actual, axis=1) / np.linalg.norm(expected, axis=1)
    expected_top5, actual_top5 = (np.argsort(-logits, axis=1)[:, :5] for logits in (expected, actual))
    common = [len({*row} & {*other}) / len(row) for row, other in zip(expected_top5, actual_top5, strict=True)]
    return {
        "cosine_min": float(cosine.min()),
        "cosine_mean": float(cosine.mean()),
        "relative_l2_max": float(relative_l2.max()),
        "relative_l2_mean": float(relative_l2.mean()),
        "top1_agreement": float((expected_top5[:, 0] == actual_top5[:, 0]).mean()),
        "top5_agreement": float(np.mean(common)),
    }


def _load_classifier(directory: Path) -> Classifier:
    classifier = Classifier(Settings(device="cpu"), directory)
    classifier.load()
    return classifier


def _preprocess(directory: Path, images: Sequence[bytes]) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Yield a batch of one row per image, preprocessed as the server does it."""
    classifier = _load_classifier(directory)
    for image in images:
        yield classifier.preprocess(Request("model", (Tensor.from_values("image", "BYTES", [1], [image]),)))


def _predict_logits(directory: Path, batches: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[np.float32]:
    classifier = _load_classifier(directory)
    return np.concatenate([classifier.predict(batch)["logits"] for batch in batches])
