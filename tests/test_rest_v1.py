"""pinnace/rest_v1.py, asked by curl and httpx as the tutorial's readers would."""

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
from pinnace.tensors import tensor_of_values
from tests.pictures import CAT, MODES, PHOTOGRAPHS, TUTORIAL_REQUEST, v1_request
from tests.servers import Server, running
from tests.test_classifier import original_logits

if TYPE_CHECKING:
    from model_export.source import Source

PREDICT = "/v1/models/custom-model:predict"


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with running("--predictor=tests.predictors:Echo") as server:
        yield server


def curl(server: Server, *arguments: str) -> tuple[int, Any]:
    """Status and JSON of one call; curl's own defaults are part of what is tested."""
    done = subprocess.run(
        ["curl", "-sS", "-m", "30", "-w", "\n%{http_code}", *arguments, server.url + PREDICT],
        capture_output=True,
        text=True,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def top5(original: Source, picture: bytes) -> list[float]:
    return sorted(original_logits(original, picture).tolist(), reverse=True)[:5]


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: application/json",
        "Content-Type: application/json; charset=utf-8",
        "Content-Type: APPLICATION/JSON",
        "Content-Type: application/octet-stream",
        "Content-Type: text/plain",
        "Content-Type:",  # none at all, as KServe's batcher
        "X-Nothing: the default of curl -d, application/x-www-form-urlencoded",
    ],
)
def test_the_tutorials_request_is_answered_whatever_type_it_claims(
    header: str, server: Server, original: Source, tmp_path: Path
) -> None:
    if not TUTORIAL_REQUEST.exists():
        pytest.skip(f"the tutorial's {TUTORIAL_REQUEST.name} is not beside the project")

    status, answer = curl(server, "-H", header, "-d", f"@{TUTORIAL_REQUEST}")

    assert status == 200
    assert answer.keys() == {"predictions"}
    np.testing.assert_allclose(answer["predictions"], [top5(original, PHOTOGRAPHS["the tutorial's"])], atol=1e-4)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_gets_the_five_highest_logits_of_torch(name: str, server: Server, original: Source) -> None:
    response = server.predict(v1_request(PHOTOGRAPHS[name]), content_type="application/json")

    assert response.status_code == 200
    np.testing.assert_allclose(response.json()["predictions"], [top5(original, PHOTOGRAPHS[name])], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_image_is_answered_as_a_body_of_its_own(name: str, server: Server, original: Source) -> None:
    response = server.predict(MODES[name], content_type="image/jpeg")

    np.testing.assert_allclose(response.json()["predictions"], [top5(original, MODES[name])], rtol=0, atol=1e-4)


def test_a_picture_is_sent_by_curl_as_it_is(server: Server, original: Source, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)

    status, answer = curl(server, "-H", "Content-Type: image/png", "--data-binary", f"@{tmp_path}/cat.png")

    assert status == 200
    np.testing.assert_allclose(answer["predictions"], [top5(original, CAT)], rtol=0, atol=1e-4)


def test_every_instance_gets_a_row_in_its_order(server: Server, original: Source) -> None:
    pictures = list(PHOTOGRAPHS.values())[:3]

    predictions = server.predict(v1_request(*pictures)).json()["predictions"]

    np.testing.assert_allclose(predictions, [top5(original, picture) for picture in pictures], rtol=0, atol=1e-4)


def test_a_tensor_that_a_transformer_prepared_is_answered_as_its_image(server: Server, model_dir: Path) -> None:
    classifier = Classifier(Settings(), model_dir)
    classifier.load()
    pixels = classifier.preprocess(Request("", (tensor_of_values("", "BYTES", [2], [CAT, MODES["BMP"]]),)))["pixels"]

    response = server.predict(json.dumps({"instances": [{"data": row.tolist()} for row in pixels]}))

    assert response.status_code == 200
    expected = server.predict(v1_request(CAT, MODES["BMP"])).json()["predictions"]
    np.testing.assert_allclose(response.json()["predictions"], expected, rtol=0, atol=1e-5)


def test_a_tensor_of_whole_numbers_is_a_tensor(server: Server) -> None:
    zeros = np.zeros((3, 224, 224), int).tolist()

    assert server.predict(json.dumps({"instances": [{"data": zeros}]})).status_code == 200


def test_inputs_is_another_name_for_instances(server: Server) -> None:
    request = json.loads(v1_request(CAT))

    renamed = server.predict(json.dumps({"inputs": request["instances"]}))

    assert renamed.json() == server.predict(json.dumps(request)).json()


def b64(data: bytes) -> str:
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
        (v1_request(CAT, CAT[:5000]), "input 'image', row 1: a truncated, damaged or unsupported image"),
        (
            '{"instances": [{"image": "a"}, {"data": "b"}]}',
            "instances[1] must be an object with the same keys as insta",
        ),
        ('{"instances": [{"image": "a"}, 7]}', "instances[1] must be an object with the same keys as instances[0]"),
        ('{"instances": [{"image": "a", "mask": "b"}]}', "the model takes one value an instance, not 2"),
        ('{"instances": [{"data": [[1, 2], [3]]}]}', "'data': the instances are not numbers in lists of one shape"),
        ('{"instances": [{"data": [["a"]]}]}', "'data': the instances are not all numbers, or not all of one kind"),
        (
            '{"instances": [{"data": [1, 2]}]}',
            "input 'data' is INT64 of shape [1, 2]: neither BYTES with an image a row",
        ),
        (f'{{"instances": {"[" * 100_000}{"]" * 100_000}}}', "Unrecognized request format: "),
    ],
)
def test_a_request_that_cannot_be_answered_is_400_and_names_what_is_wrong(
    body: str, error: str, server: Server
) -> None:
    response = server.predict(body.encode("latin-1" if body == "\xff" else "utf-8"), content_type="application/json")

    assert response.status_code == 400
    assert response.json().keys() == {"error"}
    assert response.json()["error"].startswith(error)


def test_an_unknown_model_is_404_before_its_body_is_looked_at(server: Server) -> None:
    response = server.post("/v1/models/nope:predict", "{")

    assert (response.status_code, response.json()) == (404, {"error": "Model with name nope does not exist."})


@pytest.mark.parametrize("content_type", ["application/xml", "multipart/form-data; boundary=x", "video/mp4", "json"])
def test_a_type_that_is_neither_json_nor_an_image_is_415(content_type: str, server: Server) -> None:
    response = server.predict(v1_request(CAT), content_type=content_type)

    assert response.status_code == 415
    assert "Content-Type" in response.json()["error"]


def test_a_compressed_body_is_415(server: Server) -> None:
    response = server.predict(b"\x1f\x8b", content_encoding="gzip")

    assert response.status_code == 415
    assert "Content-Encoding" in response.json()["error"]


def test_more_instances_than_allowed_are_413(server: Server) -> None:
    response = server.predict(v1_request(*[b"x"] * 129))

    assert (response.status_code, response.json()) == (413, {"error": "129 instances exceed max_instances (128)"})


def test_an_image_of_too_many_pixels_is_413_and_named(model_dir: Path) -> None:
    with running(f"--model_dir={model_dir}", "--max_image_pixels=135299") as server:
        response = server.predict(v1_request(MODES["one pixel"], CAT))

    assert response.status_code == 413
    assert response.json()["error"] == "input 'image', row 1: an image of 451 × 300 exceeds max_image_pixels (135299)"


def test_a_classification_has_labels_probabilities_and_logits(server: Server, original: Source) -> None:
    request = json.loads(v1_request(CAT, MODES["JPEG"])) | {"signature_name": "classification"}

    predictions = server.predict(json.dumps(request)).json()["predictions"]

    logits = server.predict(v1_request(CAT, MODES["JPEG"])).json()["predictions"]
    assert [[found["logit"] for found in row] for row in predictions] == logits
    for found in predictions[0]:
        assert found.keys() == {"label", "index", "probability", "logit"}
        assert found["label"] == original.labels[found["index"]]
    shares = [found["probability"] for found in predictions[0]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1


@pytest.mark.parametrize("signature", ["serving_default", "predict"])
def test_the_default_signature_may_be_named(signature: str, server: Server) -> None:
    request = json.loads(v1_request(CAT)) | {"signature_name": signature}

    assert server.predict(json.dumps(request)).json() == server.predict(v1_request(CAT)).json()


@pytest.mark.parametrize("signature", ["regression", "", 5, ["classification"], None])
def test_another_signature_is_refused(signature: Any, server: Server) -> None:
    response = server.predict(json.dumps(json.loads(v1_request(CAT)) | {"signature_name": signature}))

    error = '"signature_name" must be one of serving_default, predict, classification'
    assert (response.status_code, response.json()) == (400, {"error": error})


@pytest.mark.parametrize(
    ("instances", "predictions"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ([True, False], [True, False]),
        (["text", "Grüße"], ["text", "Grüße"]),
        ([{"b64": b64(b"raw")}], ["raw"]),
        ([{"x": "a"}, {"x": {"b64": b64(b"b")}}], ["a", "b"]),
    ],
)
def test_instances_of_every_kind_reach_a_predictor_and_come_back(
    instances: list[Any], predictions: list[Any], echo: Server
) -> None:
    response = echo.predict(json.dumps({"instances": instances}))

    assert (response.status_code, response.json()) == (200, {"predictions": predictions})
