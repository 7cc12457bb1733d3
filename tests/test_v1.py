"""pinnace/http/v1.py: predictions over V1, sent by curl and httpx as readers of the tutorial do."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pinnace.models.classifier import Classifier
from pinnace.predictor import Request
from pinnace.settings import Settings
from pinnace.tensors import Tensor
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS, TUTORIAL_REQUEST
from tests.support.reference import compute_original_logits
from tests.support.servers import Server, run_server

if TYPE_CHECKING:
    from model_export.source import Source

PREDICT = "/v1/models/custom-model:predict"


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        yield server


def predict_with_curl(server: Server, *arguments: str) -> tuple[int, Any]:
    """Send a prediction request as curl does by default. Return the HTTP status and the parsed JSON."""
    done = subprocess.run(
        ["curl", "-sS", "-m", "30", "-w", "\n%{http_code}", *arguments, server.url + PREDICT],
        capture_output=True,
        text=True,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def compute_top5(original: Source, picture: bytes) -> list[float]:
    return sorted(compute_original_logits(original, picture).tolist(), reverse=True)[:5]


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: application/json",
        "Content-Type: application/json; charset=utf-8",
        "Content-Type: APPLICATION/JSON",
        "Content-Type: application/octet-stream",
        "Content-Type: text/plain",
        "Content-Type:",  # no type, as KServe's batcher sends it
        "X-Nothing: the default of curl -d, application/x-www-form-urlencoded",
    ],
)
def test_the_tutorials_request_is_answered_with_any_of_these_content_types(
    header: str, server: Server, original: Source, tmp_path: Path
) -> None:
    if not TUTORIAL_REQUEST.exists():
        pytest.skip(f"the tutorial's {TUTORIAL_REQUEST.name} is not beside the project")

    status, answer = predict_with_curl(server, "-H", header, "-d", f"@{TUTORIAL_REQUEST}")

    assert status == 200
    assert answer.keys() == {"predictions"}
    np.testing.assert_allclose(
        answer["predictions"], [compute_top5(original, PHOTOGRAPHS["the tutorial's"])], atol=1e-4
    )


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_gets_the_five_highest_logits_of_torch(name: str, server: Server, original: Source) -> None:
    response = server.predict(make_v1_request(PHOTOGRAPHS[name]), content_type="application/json")

    assert response.status_code == 200
    np.testing.assert_allclose(
        response.json()["predictions"], [compute_top5(original, PHOTOGRAPHS[name])], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_image_can_be_the_body(name: str, server: Server, original: Source) -> None:
    response = server.predict(MODES[name], content_type="image/jpeg")

    np.testing.assert_allclose(response.json()["predictions"], [compute_top5(original, MODES[name])], rtol=0, atol=1e-4)


def test_curl_can_send_a_picture_as_the_body(server: Server, original: Source, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)

    status, answer = predict_with_curl(server, "-H", "Content-Type: image/png", "--data-binary", f"@{tmp_path}/cat.png")

    assert status == 200
    np.testing.assert_allclose(answer["predictions"], [compute_top5(original, CAT)], rtol=0, atol=1e-4)


def test_predictions_are_in_the_order_of_the_instances(server: Server, original: Source) -> None:
    pictures = list(PHOTOGRAPHS.values())[:3]

    predictions = server.predict(make_v1_request(*pictures)).json()["predictions"]

    np.testing.assert_allclose(
        predictions, [compute_top5(original, picture) for picture in pictures], rtol=0, atol=1e-4
    )


def test_a_tensor_from_a_transformer_gets_the_answer_to_its_image(server: Server, model_dir: Path) -> None:
    classifier = Classifier(Settings(), model_dir)
    classifier.load()
    pixels = classifier.preprocess(Request("", (Tensor.from_values("", "BYTES", [2], [CAT, MODES["BMP"]]),)))["pixels"]

    response = server.predict(json.dumps({"instances": [{"data": row.tolist()} for row in pixels]}))

    assert response.status_code == 200
    expected = server.predict(make_v1_request(CAT, MODES["BMP"])).json()["predictions"]
    np.testing.assert_allclose(response.json()["predictions"], expected, rtol=0, atol=1e-5)


def test_a_tensor_of_integers_is_answered(server: Server) -> None:
    zeros = np.zeros((3, 224, 224), int).tolist()

    assert server.predict(json.dumps({"instances": [{"data": zeros}]})).status_code == 200


def test_inputs_is_accepted_for_instances(server: Server) -> None:
    request = json.loads(make_v1_request(CAT))

    renamed = server.predict(json.dumps({"inputs": request["instances"]}))

    assert renamed.json() == server.predict(json.dumps(request)).json()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", "Unrecognized request format: "),
        ("{", "Unrecognized request format: "),
        ('{"instances": [NaN]}', "Unrecognized request format: "),
        ("\xff", "Unrecognized request format: "),
        ("[1, 2]", 'the body must be a JSON object with "instances"'),
        ('"text"', 'the body must be a JSON object with "instances"'),
        ("{}", '"instances" is missing'),
        ('{"instances": null}', '"instances" is missing'),
        ('{"instances": {"image": 1}}', 'Expected "instances" to be a list'),
        ('{"instances": "text"}', 'Expected "instances" to be a list'),
        ('{"instances": []}', '"instances" is empty'),
        ('{"instances": [{}]}', "instances[0] is empty"),
        ('{"instances": [null]}', "'instances': the instances are not all numbers, or not all of one kind"),
        (
            '{"instances": [{"image": {}}]}',
            'instances[0].image must be a value, or an object with base64 text as "b64"',
        ),
        ('{"instances": [{"image": {"b64": 5}}]}', "instances[0].image must be a value, or an object with base64"),
        ('{"instances": [{"image": {"b64": "@@"}}]}', "instances[0].image.b64: not valid base64"),
        ('{"instances": [{"image": {"b64": "abc"}}]}', "instances[0].image.b64: not valid base64"),
        ('{"instances": [{"image": {"b64": "é"}}]}', "instances[0].image.b64: not valid base64"),
        (
            '{"instances": [{"image": {"b64": ""}}]}',
            "input 'image', row 0: neither an image (JPEG, PNG, WEBP, GIF, BMP",
        ),
        ('{"instances": [{"image": {"b64": "aGVsbG8="}}]}', "input 'image', row 0: neither an image (JPEG, PNG, WEBP"),
        ('{"instances": [{"image": "hello"}]}', "input 'image', row 0: neither an image (JPEG, PNG, WEBP, GIF, BMP"),
        (make_v1_request(CAT, CAT[:5000]), "input 'image', row 1: a truncated, damaged or unsupported image"),
        (
            '{"instances": [{"image": "a"}, {"data": "b"}]}',
            "instances[1] must be an object with the same keys as insta",
        ),
        ('{"instances": [{"image": "a"}, 7]}', "instances[1] must be an object with the same keys as instances[0]"),
        ('{"instances": [{"image": "a", "mask": "b"}]}', "each instance must have one value, not 2"),
        ('{"instances": [{"data": [[1, 2], [3]]}]}', "'data': the instances are not numbers in lists of one shape"),
        ('{"instances": [{"data": [["a"]]}]}', "'data': the instances are not all numbers, or not all of one kind"),
        (
            '{"instances": [{"data": [1, 2]}]}',
            "input 'data' is INT64 of shape [1, 2]: expected BYTES with one image per row",
        ),
        (f'{{"instances": {"[" * 100_000}{"]" * 100_000}}}', "Unrecognized request format: "),
    ],
)
def test_an_invalid_request_is_400_with_the_reason(body: str, error: str, server: Server) -> None:
    response = server.predict(body.encode("latin-1" if body == "\xff" else "utf-8"), content_type="application/json")

    assert response.status_code == 400
    assert response.json().keys() == {"error"}
    assert response.json()["error"].startswith(error)


def test_an_unknown_model_is_404_before_the_body_is_parsed(server: Server) -> None:
    response = server.post("/v1/models/nope:predict", "{")

    assert (response.status_code, response.json()) == (404, {"error": "Model with name nope does not exist."})


@pytest.mark.parametrize("content_type", ["application/xml", "multipart/form-data; boundary=x", "video/mp4", "json"])
def test_a_type_that_is_neither_json_nor_an_image_is_415(content_type: str, server: Server) -> None:
    response = server.predict(make_v1_request(CAT), content_type=content_type)

    assert response.status_code == 415
    assert "Content-Type" in response.json()["error"]


def test_a_compressed_body_is_415(server: Server) -> None:
    response = server.predict(b"\x1f\x8b", content_encoding="gzip")

    assert response.status_code == 415
    assert "Content-Encoding" in response.json()["error"]


def test_more_instances_than_max_instances_are_413(server: Server) -> None:
    response = server.predict(make_v1_request(*[b"x"] * 129))

    assert (response.status_code, response.json()) == (413, {"error": "129 instances exceed max_instances (128)"})


def test_an_image_of_more_than_max_image_pixels_is_413_and_named_by_its_row(model_dir: Path) -> None:
    with run_server(f"--model_dir={model_dir}", "--max_image_pixels=135299") as server:
        response = server.predict(make_v1_request(MODES["one pixel"], CAT))

    assert response.status_code == 413
    assert response.json()["error"] == "input 'image', row 1: an image of 451 × 300 exceeds max_image_pixels (135299)"


def test_a_classification_has_labels_probabilities_and_logits(server: Server, original: Source) -> None:
    request = json.loads(make_v1_request(CAT, MODES["JPEG"])) | {"signature_name": "classification"}

    predictions = server.predict(json.dumps(request)).json()["predictions"]

    logits = server.predict(make_v1_request(CAT, MODES["JPEG"])).json()["predictions"]
    assert [[found["logit"] for found in row] for row in predictions] == logits
    for found in predictions[0]:
        assert found.keys() == {"label", "index", "probability", "logit"}
        assert found["label"] == original.labels[found["index"]]
    shares = [found["probability"] for found in predictions[0]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1


@pytest.mark.parametrize("signature", ["serving_default", "predict"])
def test_the_default_signature_may_be_named(signature: str, server: Server) -> None:
    request = json.loads(make_v1_request(CAT)) | {"signature_name": signature}

    assert server.predict(json.dumps(request)).json() == server.predict(make_v1_request(CAT)).json()


@pytest.mark.parametrize("signature", ["regression", "", 5, ["classification"], None])
def test_another_signature_is_refused(signature: Any, server: Server) -> None:
    response = server.predict(json.dumps(json.loads(make_v1_request(CAT)) | {"signature_name": signature}))

    error = '"signature_name" must be one of serving_default, predict, classification'
    assert (response.status_code, response.json()) == (400, {"error": error})


@pytest.mark.parametrize(
    ("instances", "predictions"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ([True, False], [True, False]),
        (["text", "Grüße"], ["text", "Grüße"]),
        ([{"b64": to_base64(b"raw")}], ["raw"]),
        ([{"x": "a"}, {"x": {"b64": to_base64(b"b")}}], ["a", "b"]),
    ],
)
def test_instances_of_every_kind_are_passed_to_the_predictor_and_returned(
    instances: list[Any], predictions: list[Any], echo: Server
) -> None:
    response = echo.predict(json.dumps({"instances": instances}))

    assert (response.status_code, response.json()) == (200, {"predictions": predictions})
