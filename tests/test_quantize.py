"""model_export/quantize.py: smaller models, and what they say of their error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="tests the export, which needs torch")
import onnx_ir

from model_export.errors import BadRequest, Mismatch
from model_export.export import MODEL_FILE, WEIGHTS_SUFFIX, write
from model_export.quantize import error, images, quantize
from pinnace.models.classifier import Classifier
from pinnace.models.model_card import ModelCard
from pinnace.predictor import Request
from pinnace.runtimes.onnx import OnnxSession
from pinnace.settings import Settings
from pinnace.tensors import tensor_of_values
from tests.pictures import CAT, MODES, PHOTOGRAPHS, v1_request
from tests.servers import running

MB = 1_000_000


def card_of(model_dir: Path) -> ModelCard:
    return ModelCard.from_properties(OnnxSession(model_dir, "cpu", 1).metadata)


@pytest.fixture(scope="module")
def in_precision(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported AlexNet in another precision, as the command line makes it."""
    made: dict[str, Path] = {}

    def make(precision: str) -> Path:
        if precision not in made:
            model = onnx_ir.load(model_dir / MODEL_FILE)
            model, card = quantize(model, card_of(model_dir), model_dir, precision, *images(None))
            made[precision] = tmp_path_factory.mktemp(precision)
            write(model, card, made[precision], lambda _: None)
        return made[precision]

    return make


def logits(model_dir: Path) -> NDArray[np.float32]:
    """Of every photograph, those that nothing was calibrated on among them."""
    classifier = Classifier(Settings(device="cpu"), model_dir)
    classifier.load()
    pictures = list(PHOTOGRAPHS.values())
    request = Request("model", (tensor_of_values("image", "BYTES", [len(pictures)], pictures),))
    found: NDArray[np.float32] = classifier.predict(classifier.preprocess(request))["logits"]
    return found


@pytest.mark.parametrize(("precision", "most_mb", "least_cosine"), [("fp16", 123, 0.99999), ("int8", 65, 0.99)])
def test_a_smaller_model_answers_nearly_what_fp32_answers(
    precision: str, most_mb: int, least_cosine: float, in_precision: Callable[[str], Path], model_dir: Path
) -> None:
    folder = in_precision(precision)
    expected, found = logits(model_dir), logits(folder)

    assert sum(file.stat().st_size for file in folder.iterdir()) < most_mb * MB
    cosines = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > least_cosine
    assert not np.array_equal(expected, found)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_smaller_model_says_how_far_from_fp32_it_is(
    precision: str, in_precision: Callable[[str], Path], model_dir: Path
) -> None:
    card, (pictures, origin) = card_of(in_precision(precision)), images(None)

    assert card.precision == precision
    assert card.weights_sha256 == card_of(model_dir).weights_sha256
    assert card.precision_error == {"images": origin, **error(model_dir, in_precision(precision), pictures)}
    assert card_of(model_dir).precision_error == {}
    assert [file.name for file in in_precision(precision).glob(f"*{WEIGHTS_SUFFIX}")] == [
        f"alexnet-{precision}-{card.weights_sha256[:12]}{WEIGHTS_SUFFIX}"
    ]


def test_an_int8_answer_is_the_same_to_the_bit_in_any_company(in_precision: Callable[[str], Path]) -> None:
    pictures = list(PHOTOGRAPHS.values())
    with running(f"--model_dir={in_precision('int8')}") as server:
        together = server.predict(v1_request(*pictures)).json()["predictions"]
        alone = [server.predict(v1_request(picture)).json()["predictions"][0] for picture in pictures]

    assert together == alone


def test_the_matrices_of_an_int8_model_are_stored_as_they_are_multiplied_with(
    in_precision: Callable[[str], Path],
) -> None:
    graph = onnx_ir.load(in_precision("int8") / MODEL_FILE).graph

    assert [node.attributes.get_int("transB") for node in graph if node.op_type == "Gemm"] == [0, 0, 0]
    assert graph.initializers["classifier.1.weight_quantized"].shape == (9216, 4096)


def test_pictures_of_ones_own_set_the_ranges(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "bus.jpg").write_bytes(MODES["JPEG"])
    (tmp_path / "notes.txt").write_text("no picture")

    assert images(tmp_path) == ([MODES["JPEG"], CAT], "2 pictures of --calibration")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")

    with pytest.raises(BadRequest, match="has no pictures"):
        images(tmp_path)


def test_a_model_that_lost_too_much_is_refused(model_dir: Path, tmp_path: Path) -> None:
    model, card = onnx_ir.load(model_dir / MODEL_FILE), card_of(model_dir)
    exact = tmp_path / "exact"
    weights = model.graph.initializers["classifier.6.weight"]
    assert weights.const_value
    huge = weights.const_value.numpy() * 1e6  # beyond what FP16 holds
    weights.const_value = onnx_ir.tensor(huge, name=weights.name)
    write(model, card, exact, lambda _: None)

    with pytest.raises(Mismatch, match="fp16 is too far from fp32"):
        quantize(model, card, exact, "fp16", [CAT], "one picture")


def test_the_error_is_json_like_all_of_the_card(in_precision: Callable[[str], Path]) -> None:
    properties = card_of(in_precision("int8")).to_properties()

    assert 0.99 < json.loads(properties["precision_error"])["cosine_min"] <= 1
