"""pinnace/models/classifier.py against the original in torch: the same logits for every photograph and image format."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import grpc
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
from pinnace.tensors import Tensor
from tests.support.clients import call_grpc, make_tensor_request
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS, encode_picture
from tests.support.reference import compute_original_logits
from tests.support.servers import Server

if TYPE_CHECKING:
    from model_export.source import Source

MAX_DIFFERENCE = 1e-4


@pytest.fixture(scope="module")
def classifier(model_dir: Path) -> Classifier:
    classifier = Classifier(Settings(), model_dir)
    classifier.load()
    return classifier


def make_request(*pictures: bytes) -> Request:
    return Request("alexnet", (Tensor.from_values("image", "BYTES", [len(pictures)], pictures),))


def compute_logits(classifier: Classifier, request: Request) -> NDArray[np.float32]:
    return classifier.predict(classifier.preprocess(request))["logits"]


def make_overflowing_tensor() -> NDArray[np.float32]:
    """Return finite pixels whose products are not finite."""
    return np.full((1, 3, 224, 224), 3e38, np.float32)


def test_an_input_that_overflows_in_the_model_fails_alone_in_its_batch(classifier: Classifier) -> None:
    good = make_request(CAT)
    bad = Request("alexnet", (Tensor("image", make_overflowing_tensor()),))
    alone = classifier.postprocess(classifier.predict(classifier.preprocess(good)), good)

    rows = [classifier.preprocess(request)["pixels"] for request in (good, bad, good)]
    logits = classifier.predict({"pixels": np.concatenate(rows)})["logits"]

    with pytest.raises(InvalidInput, match="row 0: the model's result is not finite, since the input's values are too"):
        classifier.postprocess({"logits": logits[1:2]}, bad)
    with pytest.raises(InvalidInput, match="row 1: "):
        classifier.postprocess({"logits": logits}, bad)
    for row in (0, 2):
        (output,) = classifier.postprocess({"logits": logits[row : row + 1]}, good).outputs
        np.testing.assert_array_equal(output.array, alone.outputs[0].array)


def test_an_input_that_overflows_in_the_model_gets_400_over_every_protocol(server: Server, google: ModuleType) -> None:
    pixels = make_overflowing_tensor()
    tensor = {"name": "input-0", "datatype": "FP32", "shape": list(pixels.shape), "data": [3e38] * pixels.size}
    problem = "row 0: the model's result is not finite, since the input's values are too large"

    for path, body in (
        ("/v1/models/custom-model:predict", {"instances": [{"data": pixels[0].tolist()}]}),
        ("/v2/models/custom-model/infer", {"inputs": [tensor]}),
        ("/v2/models/custom-model/infer", {"inputs": [tensor], "outputs": [{"name": "probabilities"}]}),
    ):
        response = server.post(path, json.dumps(body))
        assert (response.status_code, response.json()) == (400, {"error": problem})
    with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        call_grpc(channel, google, "ModelInfer", make_tensor_request(google, pixels, raw=True))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, problem)


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, *MODES])
def test_all_logits_equal_those_of_torch(name: str, classifier: Classifier, original: Source) -> None:
    picture = {**PHOTOGRAPHS, **MODES}[name]

    difference = np.abs(
        compute_logits(classifier, make_request(picture))[0] - compute_original_logits(original, picture)
    ).max()

    assert difference <= MAX_DIFFERENCE


def test_the_tolerance_is_far_below_the_difference_of_any_two_photographs(classifier: Classifier) -> None:
    logits = compute_logits(classifier, make_request(*PHOTOGRAPHS.values()))

    differences = [np.abs(first - second).max() for row, first in enumerate(logits) for second in logits[:row]]
    assert min(differences) > 1000 * MAX_DIFFERENCE


def test_images_in_one_request_get_the_logits_that_each_gets_alone(classifier: Classifier) -> None:
    together = compute_logits(classifier, make_request(*PHOTOGRAPHS.values()))

    alone = np.concatenate([compute_logits(classifier, make_request(picture)) for picture in PHOTOGRAPHS.values()])
    np.testing.assert_allclose(together, alone, rtol=0, atol=MAX_DIFFERENCE)


def test_the_answer_is_the_five_highest_logits_descending(classifier: Classifier) -> None:
    logits = np.arange(12, dtype=np.float32).reshape(2, 6) % 7

    (output,) = classifier.postprocess({"logits": logits}, make_request(CAT)).outputs

    assert (output.name, output.datatype) == ("output-0", "FP32")
    assert output.array.tolist() == [[5, 4, 3, 2, 1], [6, 4, 3, 2, 1]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_preprocessed_tensor_gets_the_logits_of_its_image(dtype: type, classifier: Classifier) -> None:
    pixels: NDArray[Any] = classifier.preprocess(make_request(CAT))["pixels"].astype(dtype)

    preprocessed = compute_logits(classifier, Request("alexnet", (Tensor("data", pixels),)))

    np.testing.assert_allclose(
        preprocessed, compute_logits(classifier, make_request(CAT)), atol=0.1 if dtype == np.float16 else 1e-5
    )


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (
            np.zeros((1, 3, 224, 225), np.float32),
            r"is FP32 of shape \[1, 3, 224, 225\]: expected BYTES",
        ),
        (
            np.zeros((3, 224, 224), np.float32),
            r"is FP32 of shape \[3, 224, 224\]: expected BYTES",
        ),
        (np.zeros((1, 3, 224, 224), np.uint8), r"is UINT8 of shape .*, or FP32 of shape \[rows, 3, 224, 224\]"),
        (np.full((1, 3, 224, 224), np.nan, np.float32), "has values that are not finite"),
        (np.full((1, 3, 224, 224), 1e300), "has values that are not finite"),
    ],
)
def test_a_tensor_of_another_shape_or_datatype_is_refused(
    array: NDArray[np.float32], problem: str, classifier: Classifier
) -> None:
    with pytest.raises(InvalidInput, match=f"^input 'data' {problem}"):
        classifier.preprocess(Request("alexnet", (Tensor("data", array),)))


def test_a_preprocessed_tensor_is_not_copied(classifier: Classifier) -> None:
    message = np.zeros((2, 3, 224, 224), np.float32).tobytes()
    preprocessed = np.frombuffer(message, np.float32).reshape(2, 3, 224, 224)

    pixels = classifier.preprocess(Request("alexnet", (Tensor("data", preprocessed),)))["pixels"]

    assert np.shares_memory(pixels, preprocessed)
    assert classifier.predict({"pixels": pixels})["logits"].shape == (2, 1000)


def test_the_error_of_a_bad_image_names_its_row(classifier: Classifier) -> None:
    with pytest.raises(InvalidInput, match=r"^input 'image', row 1: neither an image"):
        classifier.preprocess(make_request(CAT, b"no image", CAT))


def test_several_inputs_are_concatenated_to_rows(classifier: Classifier) -> None:
    inputs = make_request(CAT).inputs + make_request(MODES["JPEG"], MODES["BMP"]).inputs

    rows = classifier.preprocess(Request("alexnet", inputs))["pixels"]

    together = classifier.preprocess(make_request(CAT, MODES["JPEG"], MODES["BMP"]))["pixels"]
    np.testing.assert_array_equal(rows, together)


def write_identity_model(folder: Path, properties: dict[str, str]) -> None:
    """Write an ONNX file that is no classifier, with these metadata properties."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["logits"])],
        "identity",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 5])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 5])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, properties)
    onnx.save(model, folder / "model.onnx")


def test_an_onnx_file_without_our_metadata_cannot_be_loaded(tmp_path: Path) -> None:
    write_identity_model(tmp_path, {})

    with pytest.raises(ModelLoadError, match=r"lacks the metadata that `python -m model_export` writes"):
        Classifier(Settings(), tmp_path).load()


def test_a_model_that_does_not_run_cannot_be_loaded(tmp_path: Path, original: Source) -> None:
    from model_export.export import make_card

    write_identity_model(tmp_path, make_card(original).to_properties())

    with pytest.raises(ModelLoadError, match=r"does not run \(.*\); export the model again$"):
        Classifier(Settings(), tmp_path).load()


@pytest.fixture(scope="module")
def fast(model_dir: Path) -> Classifier:
    classifier = Classifier(Settings(fast_decode=True), model_dir)
    classifier.load()
    return classifier


def compare_grey_levels(fast: Classifier, classifier: Classifier, picture: bytes) -> NDArray[np.float32]:
    """Return the absolute differences of the pixels of the crop, on a scale of 255."""
    quick, exact = (each.preprocess(make_request(picture))["pixels"][0] for each in (fast, classifier))
    differences: NDArray[np.float32] = np.abs(quick - exact) * np.array(classifier.card.std)[:, None, None] * 255
    return differences


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("times", [1, 3])
def test_fast_decoding_of_a_jpeg_differs_by_three_grey_levels_on_average_and_hardly_in_logits(
    name: str, times: int, fast: Classifier, classifier: Classifier
) -> None:
    picture = Image.open(io.BytesIO(PHOTOGRAPHS[name])).convert("RGB")
    jpeg = encode_picture(picture.resize((picture.width * times, picture.height * times)), "JPEG", quality=90)

    assert compare_grey_levels(fast, classifier, jpeg).mean() < 3
    quick, exact = (compute_logits(each, make_request(jpeg))[0] for each in (fast, classifier))
    assert quick @ exact / np.linalg.norm(quick) / np.linalg.norm(exact) > 0.999


@pytest.mark.parametrize("name", [name for name in MODES if not name.startswith("JPEG")])
def test_fast_decoding_of_other_formats_differs_by_two_grey_levels_at_most(
    name: str, fast: Classifier, classifier: Classifier
) -> None:
    assert compare_grey_levels(fast, classifier, MODES[name]).max() < 2.5


def test_fast_decoding_keeps_the_picture_at_least_as_large_as_the_resize_size(fast: Classifier) -> None:
    jpeg = encode_picture(Image.open(io.BytesIO(CAT)).convert("RGB").resize((2100, 1500)), "JPEG")

    assert image.decode(jpeg, 10**9, fast.card.resize_pixels).size == (525, 375)
    assert image.decode(jpeg, 10**9).size == (2100, 1500)
