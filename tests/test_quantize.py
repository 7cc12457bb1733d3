"""model_export/quantize.py: FP16 and INT8 models and their error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from numpy.typing import NDArray

from model_export.errors import BadRequest, Mismatch
from model_export.export import MODEL_FILE, WEIGHTS_SUFFIX, write
from model_export.quantize import error, images, quantize
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
def export_quantized(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that quantizes the exported AlexNet once per precision, as the command line does."""
    folders: dict[str, Path] = {}

    def make(precision: str) -> Path:
        if precision not in folders:
            model = onnx_ir.load(model_dir / MODEL_FILE)
            model, card = quantize(model, read_card(model_dir), model_dir, precision, *images(None))
            folders[precision] = tmp_path_factory.mktemp(precision)
            write(model, card, folders[precision], lambda _: None)
        return folders[precision]

    return make


def compute_logits(model_dir: Path) -> NDArray[np.float32]:
    """Return the logits of every photograph, including those that were not used for calibration."""
    classifier = Classifier(Settings(device="cpu"), model_dir)
    classifier.load()
    pictures = list(PHOTOGRAPHS.values())
    request = Request("model", (Tensor.from_values("image", "BYTES", [len(pictures)], pictures),))
    found: NDArray[np.float32] = classifier.predict(classifier.preprocess(request))["logits"]
    return found


@pytest.mark.parametrize(("precision", "max_mb", "min_cosine"), [("fp16", 123, 0.99999), ("int8", 65, 0.99)])
def test_a_quantized_model_gives_nearly_the_logits_of_fp32(
    precision: str, max_mb: int, min_cosine: float, export_quantized: Callable[[str], Path], model_dir: Path
) -> None:
    folder = export_quantized(precision)
    expected, found = compute_logits(model_dir), compute_logits(folder)

    assert sum(file.stat().st_size for file in folder.iterdir()) < max_mb * MB
    cosines = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > min_cosine
    assert not np.array_equal(expected, found)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_card_of_a_quantized_model_has_its_error(
    precision: str, export_quantized: Callable[[str], Path], model_dir: Path
) -> None:
    card, (pictures, origin) = read_card(export_quantized(precision)), images(None)

    assert card.precision == precision
    assert card.weights_sha256 == read_card(model_dir).weights_sha256
    assert card.precision_error == {"images": origin, **error(model_dir, export_quantized(precision), pictures)}
    assert read_card(model_dir).precision_error == {}
    assert [file.name for file in export_quantized(precision).glob(f"*{WEIGHTS_SUFFIX}")] == [
        f"alexnet-{precision}-{card.weights_sha256[:12]}{WEIGHTS_SUFFIX}"
    ]


def test_an_int8_answer_does_not_depend_on_the_other_rows_of_its_batch(export_quantized: Callable[[str], Path]) -> None:
    pictures = list(PHOTOGRAPHS.values())
    with run_server(f"--model_dir={export_quantized('int8')}") as server:
        together = server.predict(make_v1_request(*pictures)).json()["predictions"]
        alone = [server.predict(make_v1_request(picture)).json()["predictions"][0] for picture in pictures]

    assert together == alone


def test_the_matrices_of_an_int8_model_are_stored_transposed(
    export_quantized: Callable[[str], Path],
) -> None:
    graph = onnx_ir.load(export_quantized("int8") / MODEL_FILE).graph

    assert [node.attributes.get_int("transB") for node in graph if node.op_type == "Gemm"] == [0, 0, 0]
    assert graph.initializers["classifier.1.weight_quantized"].shape == (9216, 4096)


def test_pictures_of_the_calibration_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "bus.jpg").write_bytes(MODES["JPEG"])
    (tmp_path / "notes.txt").write_text("no picture")

    assert images(tmp_path) == ([MODES["JPEG"], CAT], "2 pictures of --calibration")


def test_a_calibration_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")

    with pytest.raises(BadRequest, match="has no pictures"):
        images(tmp_path)


def test_a_quantized_model_with_a_large_error_is_refused(model_dir: Path, tmp_path: Path) -> None:
    model, card = onnx_ir.load(model_dir / MODEL_FILE), read_card(model_dir)
    exact = tmp_path / "exact"
    weights = model.graph.initializers["classifier.6.weight"]
    assert weights.const_value
    huge = weights.const_value.numpy() * 1e6  # beyond the range of FP16
    weights.const_value = onnx_ir.tensor(huge, name=weights.name)
    write(model, card, exact, lambda _: None)

    with pytest.raises(Mismatch, match="fp16 is too far from fp32"):
        quantize(model, card, exact, "fp16", [CAT], "one picture")


def test_the_error_is_json_in_the_card(export_quantized: Callable[[str], Path]) -> None:
    properties = read_card(export_quantized("int8")).to_properties()

    assert 0.99 < json.loads(properties["precision_error"])["cosine_min"] <= 1
