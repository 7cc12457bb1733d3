"""model_export/quantize.py: models in fp16 and int8, and their measured error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="tests the export, which needs torch")
import onnx_ir

from model_export.errors import UsageError, VerificationError
from model_export.export import MODEL_FILE, WEIGHTS_SUFFIX, write_model
from model_export.quantize import measure_error, quantize, read_calibration_images
from pinnace.models.classifier import Classifier
from pinnace.models.model_card import ModelCard
from pinnace.predictor import Request
from pinnace.runtimes.onnx import OnnxSession
from pinnace.settings import Settings
from pinnace.tensors import Tensor
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS
from tests.support.servers import run_server

MB = 1_000_000


def read_card(model_dir: Path) -> ModelCard:
    return ModelCard.from_properties(OnnxSession(model_dir, "cpu", 1).metadata)


@pytest.fixture(scope="module")
def quantized_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that quantizes the exported model, and returns its directory, which the tests share."""
    directories: dict[str, Path] = {}

    def quantize_to(precision: str) -> Path:
        if precision not in directories:
            model = onnx_ir.load(model_dir / MODEL_FILE)
            model, card = quantize(model, read_card(model_dir), model_dir, precision, *read_calibration_images(None))
            directories[precision] = tmp_path_factory.mktemp(precision)
            write_model(model, card, directories[precision], lambda _: None)
        return directories[precision]

    return quantize_to


def predict_logits(model_dir: Path) -> NDArray[np.float32]:
    """Return the logits of all photographs, including some that int8 was not calibrated on."""
    classifier = Classifier(Settings(device="cpu"), model_dir)
    classifier.load()
    pictures = list(PHOTOGRAPHS.values())
    request = Request("model", (Tensor.from_values("image", "BYTES", [len(pictures)], pictures),))
    logits: NDArray[np.float32] = classifier.predict(classifier.preprocess(request))["logits"]
    return logits


@pytest.mark.parametrize(("precision", "max_mb", "min_cosine"), [("fp16", 123, 0.99999), ("int8", 65, 0.99)])
def test_a_quantized_model_is_smaller_and_close_to_fp32(
    precision: str, max_mb: int, min_cosine: float, quantized_dir: Callable[[str], Path], model_dir: Path
) -> None:
    folder = quantized_dir(precision)
    expected, actual = predict_logits(model_dir), predict_logits(folder)

    assert sum(file.stat().st_size for file in folder.iterdir()) < max_mb * MB
    cosines = (expected * actual).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(actual, axis=1)
    assert cosines.min() > min_cosine
    assert not np.array_equal(expected, actual)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_card_of_a_quantized_model_has_its_error(
    precision: str, quantized_dir: Callable[[str], Path], model_dir: Path
) -> None:
    card, (pictures, origin) = read_card(quantized_dir(precision)), read_calibration_images(None)

    assert card.precision == precision
    assert card.weights_sha256 == read_card(model_dir).weights_sha256
    assert card.precision_error == {"images": origin, **measure_error(model_dir, quantized_dir(precision), pictures)}
    assert read_card(model_dir).precision_error == {}
    assert [file.name for file in quantized_dir(precision).glob(f"*{WEIGHTS_SUFFIX}")] == [
        f"alexnet-{precision}-{card.weights_sha256[:12]}{WEIGHTS_SUFFIX}"
    ]


def test_an_int8_answer_is_bit_equal_alone_and_in_a_batch(quantized_dir: Callable[[str], Path]) -> None:
    pictures = list(PHOTOGRAPHS.values())
    with run_server(f"--model_dir={quantized_dir('int8')}") as server:
        together = server.predict(make_v1_request(*pictures)).json()["predictions"]
        alone = [server.predict(make_v1_request(picture)).json()["predictions"][0] for picture in pictures]

    assert together == alone


def test_the_linear_weights_of_an_int8_model_are_stored_transposed(
    quantized_dir: Callable[[str], Path],
) -> None:
    graph = onnx_ir.load(quantized_dir("int8") / MODEL_FILE).graph

    assert [node.attributes.get_int("transB") for node in graph if node.op_type == "Gemm"] == [0, 0, 0]
    assert graph.initializers["classifier.1.weight_quantized"].shape == (9216, 4096)


def test_the_images_of_a_calibration_directory_are_read_and_other_files_ignored(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "bus.jpg").write_bytes(MODES["JPEG"])
    (tmp_path / "notes.txt").write_text("no image")

    assert read_calibration_images(tmp_path) == ([MODES["JPEG"], CAT], "2 images of --calibration")


def test_a_calibration_directory_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")

    with pytest.raises(UsageError, match="has no images"):
        read_calibration_images(tmp_path)


def test_a_damaged_calibration_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(CAT[:200])

    with pytest.raises(UsageError, match=r"remove half\.png, which is a truncated, damaged or unsupported image"):
        read_calibration_images(tmp_path)


def test_a_quantized_model_too_far_from_fp32_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    model, card = onnx_ir.load(model_dir / MODEL_FILE), read_card(model_dir)
    fp32_dir = tmp_path / "fp32"
    weights = model.graph.initializers["classifier.6.weight"]
    assert weights.const_value
    huge = weights.const_value.numpy() * 1e6  # overflows FP16
    weights.const_value = onnx_ir.tensor(huge, name=weights.name)
    write_model(model, card, fp32_dir, lambda _: None)

    with pytest.raises(VerificationError, match="fp16 is too far from fp32"):
        quantize(model, card, fp32_dir, "fp16", [CAT], "1 image")


def test_the_error_is_json_in_the_models_metadata(quantized_dir: Callable[[str], Path]) -> None:
    properties = read_card(quantized_dir("int8")).to_properties()

    assert 0.99 < json.loads(properties["precision_error"])["cosine_min"] <= 1
