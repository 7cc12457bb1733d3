"""pinnace/classifier.py against the original in torch: the same logits for every photograph and every kind of image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from pinnace.errors import InvalidInput, ModelLoadError
from pinnace.models import image
from pinnace.models.classifier import Classifier
from pinnace.predictor import Request
from pinnace.settings import Settings
from pinnace.tensors import Tensor, tensor_of_values
from tests.pictures import CAT, MODES, PHOTOGRAPHS, encoded
from tests.test_image import torchvisions_pixels

if TYPE_CHECKING:
    from model_export.source import Source

MOST_DIFFERENCE = 1e-4


@pytest.fixture(scope="module")
def classifier(model_dir: Path) -> Classifier:
    classifier = Classifier(Settings(), model_dir)
    classifier.load()
    return classifier


def images(*pictures: bytes) -> Request:
    return Request("alexnet", (tensor_of_values("image", "BYTES", [len(pictures)], pictures),))


def logits_of(classifier: Classifier, request: Request) -> NDArray[np.float32]:
    return classifier.predict(classifier.preprocess(request))["logits"]


def original_logits(original: Source, picture: bytes) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = original.model(torch.from_numpy(torchvisions_pixels(original, picture))[None])[0]
    return logits.numpy()


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, *MODES])
def test_all_logits_equal_those_of_torchvision_and_torch(name: str, classifier: Classifier, original: Source) -> None:
    picture = {**PHOTOGRAPHS, **MODES}[name]

    difference = np.abs(logits_of(classifier, images(picture))[0] - original_logits(original, picture)).max()

    assert difference <= MOST_DIFFERENCE


def test_the_bound_is_tight_enough_to_tell_any_two_photographs_apart(classifier: Classifier) -> None:
    logits = logits_of(classifier, images(*PHOTOGRAPHS.values()))

    apart = [np.abs(one - other).max() for row, one in enumerate(logits) for other in logits[:row]]
    assert min(apart) > 1000 * MOST_DIFFERENCE


def test_many_images_in_one_request_are_answered_as_each_alone(classifier: Classifier) -> None:
    together = logits_of(classifier, images(*PHOTOGRAPHS.values()))

    alone = np.concatenate([logits_of(classifier, images(picture)) for picture in PHOTOGRAPHS.values()])
    np.testing.assert_allclose(together, alone, rtol=0, atol=MOST_DIFFERENCE)


def test_the_answer_is_the_five_highest_logits_descending(classifier: Classifier) -> None:
    logits = np.arange(12, dtype=np.float32).reshape(2, 6) % 7

    (output,) = classifier.postprocess({"logits": logits}, images(CAT)).outputs

    assert (output.name, output.datatype) == ("output-0", "FP32")
    assert output.array.tolist() == [[5, 4, 3, 2, 1], [6, 4, 3, 2, 1]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_prepared_tensor_is_answered_as_its_image(dtype: type, classifier: Classifier) -> None:
    pixels: NDArray[Any] = classifier.preprocess(images(CAT))["pixels"].astype(dtype)

    prepared = logits_of(classifier, Request("alexnet", (Tensor("data", pixels),)))

    np.testing.assert_allclose(prepared, logits_of(classifier, images(CAT)), atol=0.1 if dtype == np.float16 else 1e-5)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((1, 3, 224, 225), np.float32), r"is FP32 of shape \[1, 3, 224, 225\]: neither BYTES"),
        (np.zeros((3, 224, 224), np.float32), r"is FP32 of shape \[3, 224, 224\]: neither BYTES"),
        (np.zeros((1, 3, 224, 224), np.uint8), r"is UINT8 of shape .*, nor FP32 of shape \[rows, 3, 224, 224\]"),
        (np.full((1, 3, 224, 224), np.nan, np.float32), "has values that are not finite"),
        (np.full((1, 3, 224, 224), 1e300), "has values that are not finite"),
    ],
)
def test_a_tensor_that_was_not_prepared_for_the_model_is_refused(
    array: NDArray[np.float32], problem: str, classifier: Classifier
) -> None:
    with pytest.raises(InvalidInput, match=f"^input 'data' {problem}"):
        classifier.preprocess(Request("alexnet", (Tensor("data", array),)))


def test_a_prepared_tensor_is_run_where_it_lies(classifier: Classifier) -> None:
    message = np.zeros((2, 3, 224, 224), np.float32).tobytes()
    prepared = np.frombuffer(message, np.float32).reshape(2, 3, 224, 224)

    pixels = classifier.preprocess(Request("alexnet", (Tensor("data", prepared),)))["pixels"]

    assert np.shares_memory(pixels, prepared)
    assert classifier.predict({"pixels": pixels})["logits"].shape == (2, 1000)


def test_a_bad_image_is_named_by_its_row(classifier: Classifier) -> None:
    with pytest.raises(InvalidInput, match=r"^input 'image', row 1: neither an image"):
        classifier.preprocess(images(CAT, b"no image", CAT))


def test_several_inputs_are_rows_one_after_the_other(classifier: Classifier) -> None:
    inputs = images(CAT).inputs + images(MODES["JPEG"], MODES["BMP"]).inputs

    rows = classifier.preprocess(Request("alexnet", inputs))["pixels"]

    together = classifier.preprocess(images(CAT, MODES["JPEG"], MODES["BMP"]))["pixels"]
    np.testing.assert_array_equal(rows, together)


def identity_model(folder: Path, properties: dict[str, str]) -> None:
    """An ONNX file that is no classifier, whatever its metadata says."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["logits"])],
        "identity",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 5])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 5])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, properties)
    onnx.save(model, folder / "model.onnx")


def test_an_onnx_file_without_our_metadata_is_damaged(tmp_path: Path) -> None:
    identity_model(tmp_path, {})

    with pytest.raises(ModelLoadError, match=r"lacks the metadata that `python -m model_export` writes"):
        Classifier(Settings(), tmp_path).load()


def test_a_model_that_does_not_run_is_damaged_before_anybody_asks_it(tmp_path: Path, original: Source) -> None:
    from model_export.export import make_card

    identity_model(tmp_path, make_card(original).to_properties())

    with pytest.raises(ModelLoadError, match=r"does not run \(.*\); export the model again$"):
        Classifier(Settings(), tmp_path).load()


@pytest.fixture(scope="module")
def fast(model_dir: Path) -> Classifier:
    classifier = Classifier(Settings(fast_decode=True), model_dir)
    classifier.load()
    return classifier


def grey_levels(fast: Classifier, classifier: Classifier, picture: bytes) -> NDArray[np.float32]:
    """By how much of 255 the pixels of the crop differ."""
    one, other = (each.preprocess(images(picture))["pixels"][0] for each in (fast, classifier))
    differences: NDArray[np.float32] = np.abs(one - other) * np.array(classifier.card.std)[:, None, None] * 255
    return differences


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("times", [1, 3])
def test_fast_decoding_of_a_jpeg_differs_by_three_grey_levels_on_average_and_hardly_in_its_logits(
    name: str, times: int, fast: Classifier, classifier: Classifier
) -> None:
    picture = Image.open(io.BytesIO(PHOTOGRAPHS[name])).convert("RGB")
    jpeg = encoded(picture.resize((picture.width * times, picture.height * times)), "JPEG", quality=90)

    assert grey_levels(fast, classifier, jpeg).mean() < 3
    one, other = (logits_of(each, images(jpeg))[0] for each in (fast, classifier))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.999


@pytest.mark.parametrize("name", [name for name in MODES if not name.startswith("JPEG")])
def test_fast_decoding_of_anything_else_differs_by_two_grey_levels_at_most(
    name: str, fast: Classifier, classifier: Classifier
) -> None:
    assert grey_levels(fast, classifier, MODES[name]).max() < 2.5


def test_fast_decoding_makes_no_picture_smaller_than_it_is_needed(fast: Classifier) -> None:
    jpeg = encoded(Image.open(io.BytesIO(CAT)).convert("RGB").resize((2100, 1500)), "JPEG")

    assert image.decode(jpeg, 10**9, fast.card.resize_pixels).size == (525, 375)
    assert image.decode(jpeg, 10**9).size == (2100, 1500)
