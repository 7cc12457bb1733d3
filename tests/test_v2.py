"""pinnace/http/v2.py: inference in JSON and in binary, and the metadata of the server and its models."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from pinnace.version import __version__
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS
from tests.support.reference import preprocess_with_torchvision
from tests.support.servers import Server, run_server

if TYPE_CHECKING:
    from model_export.source import Source

INFER = "/v2/models/custom-model/infer"
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        yield server


def make_image_input(*pictures: bytes, **fields: Any) -> dict[str, Any]:
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    return {"name": "input-0", "shape": [len(texts)], "datatype": "BYTES", "data": texts, **fields}


def infer(server: Server, *inputs: dict[str, Any], tail: bytes = b"", **fields: Any) -> httpx.Response:
    header = json.dumps({"inputs": list(inputs), **fields}).encode()
    headers = {LENGTH: str(len(header))} if tail else {"content-type": "application/json"}
    return httpx.post(server.url + INFER, content=header + tail, headers=headers, timeout=60)


def get_error(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    assert response.json().keys() == {"error"}
    text: str = response.json()["error"]
    return text


def split_binary(response: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """Return the JSON and the binary tail of a response."""
    length = int(response.headers[LENGTH])
    return json.loads(response.content[:length]), response.content[length:]


def predict_over_v1(server: Server, *pictures: bytes) -> Any:
    return server.predict(make_v1_request(*pictures)).json()["predictions"]


def test_an_image_gets_the_values_of_v1(server: Server) -> None:
    response = infer(server, make_image_input(CAT), id="mine")

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "model_name": "custom-model",
        "model_version": None,
        "id": "mine",
        "parameters": None,
        "outputs": [
            {
                "name": "output-0",
                "shape": [1, 5],
                "datatype": "FP32",
                "parameters": None,
                "data": predict_over_v1(server, CAT)[0],
            }
        ],
    }


@pytest.mark.parametrize("inputs", ["one input", "three inputs"])
def test_three_images_can_be_one_input_or_three(inputs: str, server: Server) -> None:
    pictures = list(PHOTOGRAPHS.values())[:3]
    together = [make_image_input(*pictures)]
    separate = [make_image_input(picture, name=f"input-{row}") for row, picture in enumerate(pictures)]

    (output,) = infer(server, *(together if inputs == "one input" else separate)).json()["outputs"]

    assert output["shape"] == [3, 5]
    rows = np.reshape(output["data"], (3, 5))
    np.testing.assert_allclose(rows, predict_over_v1(server, *pictures), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_the_data_of_a_preprocessed_tensor_can_be_flat_or_nested(
    nested: bool, server: Server, original: Source
) -> None:
    pixels = preprocess_with_torchvision(original, CAT)[None]
    data = pixels.tolist() if nested else pixels.reshape(-1).tolist()

    response = infer(server, {"name": "x", "shape": [1, 3, 224, 224], "datatype": "FP32", "data": data})

    np.testing.assert_allclose(
        response.json()["outputs"][0]["data"], predict_over_v1(server, CAT)[0], rtol=0, atol=1e-5
    )


def test_binary_elements_are_images_or_base64_text_with_length_prefixes(server: Server) -> None:
    elements = (CAT, base64.b64encode(MODES["JPEG"]))
    tail = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}

    response = infer(server, tensor, tail=tail)

    rows = np.reshape(response.json()["outputs"][0]["data"], (2, 5))
    np.testing.assert_allclose(rows, predict_over_v1(server, CAT, MODES["JPEG"]), rtol=0, atol=1e-5)


def test_a_binary_tensor_gets_a_binary_output_with_binary_data_output(server: Server, original: Source) -> None:
    pixels = preprocess_with_torchvision(original, CAT)[None]
    tensor = {
        "name": "x",
        "shape": [1, 3, 224, 224],
        "datatype": "FP32",
        "parameters": {"binary_data_size": pixels.nbytes},
    }

    response = infer(server, tensor, tail=pixels.tobytes(), parameters={"binary_data_output": True})

    header, tail = split_binary(response)
    assert response.headers["content-type"] == "application/octet-stream"
    assert int(response.headers["content-length"]) == len(response.content)
    assert header["outputs"] == [
        {"name": "output-0", "shape": [1, 5], "datatype": "FP32", "parameters": {"binary_data_size": 20}}
    ]
    np.testing.assert_allclose(np.frombuffer(tail, "<f4"), predict_over_v1(server, CAT)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("whole", "single", "binary"),
    [(None, None, False), (True, None, True), (False, True, True), (True, False, False), (None, True, True)],
)
def test_binary_data_of_an_output_overrides_binary_data_output_of_the_request(
    whole: bool | None, single: bool | None, binary: bool, server: Server
) -> None:
    output: dict[str, Any] = {"name": "output-0"}
    fields: dict[str, Any] = {"outputs": [output]}
    if single is not None:
        output["parameters"] = {"binary_data": single}
    if whole is not None:
        fields["parameters"] = {"binary_data_output": whole}

    response = infer(server, make_image_input(CAT), **fields)

    assert (LENGTH in response.headers) is binary


def test_the_requested_outputs_are_returned_in_order_and_are_consistent(server: Server) -> None:
    names = ["labels", "logits", "probabilities", "indices", "output-0"]

    response = infer(server, make_image_input(CAT, MODES["JPEG"]), outputs=[{"name": name} for name in names])

    outputs = {output["name"]: output for output in response.json()["outputs"]}
    assert list(outputs) == names
    assert [output["datatype"] for output in outputs.values()] == ["BYTES", "FP32", "FP32", "INT64", "FP32"]
    assert [output["shape"] for output in outputs.values()] == [[2, 5], [2, 1000], [2, 5], [2, 5], [2, 5]]
    logits = np.reshape(outputs["logits"]["data"], (2, 1000))
    indices = np.reshape(outputs["indices"]["data"], (2, 5))
    np.testing.assert_array_equal(indices, np.argsort(-logits, axis=1)[:, :5])
    top = np.take_along_axis(logits, indices, axis=1)
    np.testing.assert_array_equal(np.reshape(outputs["output-0"]["data"], (2, 5)), top)
    shares = np.exp(top) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.reshape(outputs["probabilities"]["data"], (2, 5)), shares, rtol=1e-5)


def test_labels_are_torchvisions_categories_and_can_be_binary(server: Server, original: Source) -> None:
    requested = [{"name": "indices"}, {"name": "labels", "parameters": {"binary_data": True}}]

    header, tail = split_binary(infer(server, make_image_input(CAT), outputs=requested))

    indices, labels = header["outputs"]
    expected = [original.labels[index].encode() for index in indices["data"]]
    assert tail == b"".join(len(label).to_bytes(4, "little") + label for label in expected)
    assert (labels["datatype"], labels["parameters"]) == ("BYTES", {"binary_data_size": len(tail)})


def test_classification_gives_tritons_value_index_label(server: Server, original: Source) -> None:
    requested = [
        {"name": "output-0", "parameters": {"classification": 3}},
        {"name": "probabilities", "parameters": {"classification": 1}},
        {"name": "indices"},
    ]

    by_logit, by_probability, indices = infer(server, make_image_input(CAT), outputs=requested).json()["outputs"]

    assert (by_logit["shape"], by_logit["datatype"]) == ([1, 3], "BYTES")
    for text, logit, index in zip(by_logit["data"], predict_over_v1(server, CAT)[0], indices["data"], strict=False):
        assert text == f"{logit:f}:{index}:{original.labels[index]}"
    probability, index, label = by_probability["data"][0].split(":")
    assert 0 < float(probability) <= 1
    assert (int(index), label) == (indices["data"][0], original.labels[indices["data"][0]])


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"name": "foo"}, "Unexpected inference output 'foo' for model 'custom-model'"),
        ({}, "outputs[0].name must be a string"),
        (7, "outputs[0] must be an object"),
        ({"name": "logits", "parameters": []}, "parameters of outputs[0] must be an object"),
        ({"name": "labels", "parameters": {"classification": 3}}, "output 'labels' does not support classification"),
        ({"name": "logits", "parameters": {"classification": 0}}, "output 'logits': classification must be a number"),
        (
            {"name": "logits", "parameters": {"classification": 1001}},
            "output 'logits': classification must be a number",
        ),
        (
            {"name": "logits", "parameters": {"classification": True}},
            "output 'logits': classification must be a number",
        ),
    ],
)
def test_an_invalid_output_is_refused(output: Any, problem: str, server: Server) -> None:
    assert get_error(infer(server, make_image_input(CAT), outputs=[output])).startswith(problem)


def test_an_output_that_is_requested_twice_is_refused(server: Server) -> None:
    response = infer(server, make_image_input(CAT), outputs=[{"name": "logits"}, {"name": "logits"}])

    assert get_error(response) == "an output is requested twice"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": None}, "inputs[0].name must be a string"),
        ({"datatype": 5}, "inputs[0].datatype must be a string"),
        ({"datatype": "bytes"}, "input 'input-0': its datatype is not one of BOOL, INT8"),
        ({"shape": 1}, "inputs[0].shape must be a list of whole numbers"),
        ({"shape": [1.0]}, "inputs[0].shape must be a list of whole numbers"),
        ({"shape": [True]}, "inputs[0].shape must be a list of whole numbers"),
        ({"shape": [-1]}, "input 'input-0': its shape must have at most 16 dimensions, none of them negative"),
        ({"shape": [2]}, "input 'input-0': its shape does not match the 1 values that were sent"),
        ({"shape": [2**40, 2**40]}, "input 'input-0': its shape does not match"),
        ({"shape": [0], "data": []}, "the request has no instances"),
        ({"data": None}, "'data' field is missing for input 'input-0' for model 'custom-model'"),
        ({"data": "text"}, "inputs[0].data must be a list"),
        ({"data": [1]}, "inputs[0].data must be strings, as its datatype is BYTES"),
        ({"data": [["a"], "b"]}, "inputs[0].data must be strings, as its datatype is BYTES"),
        ({"data": ["no image"]}, "input 'input-0', row 0: neither an image"),
        ({"datatype": "FP32", "data": ["a"]}, "input 'input-0': its values are not FP32"),
        ({"datatype": "FP32", "data": [[1], [1, 2]]}, "input 'input-0': its values are not FP32 in lists of one shape"),
        ({"datatype": "FP32", "data": [None]}, "input 'input-0': its values are not FP32"),
        ({"datatype": "FP32", "data": [1e39]}, "input 'input-0': a value lies outside FP32"),
        ({"datatype": "INT8", "data": [1.5]}, "input 'input-0': its values are not INT8"),
        ({"datatype": "INT8", "data": [True]}, "input 'input-0': its values are not INT8"),
        ({"datatype": "UINT8", "data": [-1]}, "input 'input-0': a value lies outside UINT8"),
        ({"datatype": "BOOL", "data": [1]}, "input 'input-0': its values are not BOOL"),
        (
            {"datatype": "FP16", "data": [1.0]},
            "Sending FP16 data via JSON is not supported. Please use the binary data",
        ),
        (
            {"datatype": "FP32", "data": [1.0]},
            "input 'input-0' is FP32 of shape [1]: expected BYTES with one image per row",
        ),
        ({"parameters": 3}, "parameters of inputs[0] must be an object"),
    ],
)
def test_an_invalid_input_is_refused_by_name(changes: dict[str, Any], problem: str, server: Server) -> None:
    assert get_error(infer(server, make_image_input(CAT, **changes))).startswith(problem)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{", "Unrecognized request format: "),
        ("", "Unrecognized request format: "),
        ("[]", 'the body must be a JSON object with "inputs"'),
        ("{}", '"inputs" is missing or empty'),
        ('{"inputs": []}', '"inputs" is missing or empty'),
        ('{"inputs": {"a": 1}}', '"inputs" must be a list'),
        ('{"inputs": [5]}', "inputs[0] must be an object"),
        (
            '{"inputs": [{"name": "a", "datatype": "BYTES", "shape": [1], "data": ["x"]}], "id": 5}',
            '"id" must be a string',
        ),
        (f'{{"inputs": [{{"data": {"[" * 900}{"]" * 900}}}]}}', "inputs[0].name must be a string"),
    ],
)
def test_an_invalid_body_is_refused(body: str, problem: str, server: Server) -> None:
    assert get_error(server.post(INFER, body, content_type="application/json")).startswith(problem)


def test_deeply_nested_lists_are_refused(server: Server) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]

    assert get_error(infer(server, make_image_input(CAT, data=deep))).startswith(
        "input 'input-0', row 0: neither an image"
    )
    assert get_error(infer(server, make_image_input(CAT, data=deep, datatype="FP32"))).startswith(
        "input 'input-0': its values"
    )


@pytest.mark.parametrize(
    ("length", "size", "problem"),
    [
        ("0", 4, "Unrecognized request format: "),
        ("-1", 4, f"{LENGTH} must be the length of the JSON"),
        ("abc", 4, f"{LENGTH} must be the length of the JSON"),
        ("9" * 30, 4, f"{LENGTH} must be the length of the JSON"),
        ("100000", 4, f"{LENGTH} must be the length of the JSON"),
        (None, 3, "1 bytes follow the last binary input"),
        (None, 5, "inputs[0].parameters.binary_data_size is 5, and 4 bytes follow"),
        (None, -1, "inputs[0].parameters.binary_data_size is -1, and 4 bytes follow"),
    ],
)
def test_binary_data_of_another_size_than_declared_is_refused(
    length: str | None, size: int, problem: str, server: Server
) -> None:
    tensor = {"name": "x", "shape": [3], "datatype": "UINT8", "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [tensor]}).encode()

    response = httpx.post(server.url + INFER, content=header + b"abcd", headers={LENGTH: length or str(len(header))})

    assert get_error(response).startswith(problem)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [True, False]),
        ("INT8", [-128, 127]),
        ("INT16", [-32768, 32767]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 65535]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("FP32", [1.5, 2]),
        ("FP64", [1e300, -1.5]),
        ("BYTES", ["text", "Grüße"]),
    ],
)
def test_values_of_every_datatype_are_passed_to_the_predictor_and_returned(
    datatype: str, values: list[Any], echo: Server
) -> None:
    (output,) = infer(echo, {"name": "x", "shape": [2], "datatype": datatype, "data": values}).json()["outputs"]

    assert (output["datatype"], output["data"]) == (datatype, values)


def test_fp16_is_sent_and_returned_in_binary_only(echo: Server) -> None:
    raw = np.array([1, 2], np.float16).tobytes()
    tensor = {"name": "x", "shape": [2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}

    _, tail = split_binary(infer(echo, tensor, tail=raw, parameters={"binary_data_output": True}))
    in_json = infer(echo, tensor, tail=raw)

    assert tail == raw
    assert get_error(in_json) == (
        "Sending FP16 data via JSON is not supported. Please use the binary data format for output output-0"
    )


def test_the_server_metadata_has_name_version_and_extensions(server: Server) -> None:
    extensions = ["binary_tensor_data", "classification"]

    assert server.get("/v2").json() == {"name": "pinnace", "version": __version__, "extensions": extensions}
    assert server.get("/v2/models").json() == {"models": ["custom-model"]}
    assert server.get("/v2/models/custom-model/ready").json() == {"name": "custom-model", "ready": True}


def test_a_request_built_from_the_metadata_is_valid(server: Server) -> None:
    metadata = server.get("/v2/models/custom-model").json()
    (declared_input,) = metadata["inputs"]
    assert (declared_input["datatype"], declared_input["shape"]) == ("BYTES", [-1])
    tensor = {
        "name": declared_input["name"],
        "datatype": declared_input["datatype"],
        "shape": [2],
        "data": make_image_input(CAT, CAT)["data"],
    }

    response = infer(server, tensor, outputs=[{"name": output["name"]} for output in metadata["outputs"]])

    assert response.status_code == 200
    for declared, output in zip(metadata["outputs"], response.json()["outputs"], strict=True):
        assert (declared["name"], declared["datatype"]) == (output["name"], output["datatype"])
        assert [2, *declared["shape"][1:]] == output["shape"]


def test_an_unknown_model_is_404_before_the_body_is_parsed(server: Server) -> None:
    response = server.post("/v2/models/nope/infer", "{")

    assert (response.status_code, response.json()) == (404, {"error": "Model with name nope does not exist."})


def test_a_body_of_another_type_is_415(server: Server) -> None:
    response = server.post(INFER, "<x/>", content_type="application/xml")

    assert (response.status_code, response.json()) == (
        415,
        {"error": "the body must be application/json: see Content-Type"},
    )


@pytest.mark.parametrize("path", ["/v1/models/custom-model:predict", INFER])
def test_the_response_has_the_headers_of_the_predictor(path: str, server: Server) -> None:
    body = make_v1_request(CAT) if path.startswith("/v1") else json.dumps({"inputs": [make_image_input(CAT)]})

    response = server.post(path, body)

    assert 0 < float(response.headers["prediction-time-latency"]) < 10_000


@pytest.mark.parametrize("path", ["/v1/models/custom-model:predict", INFER])
def test_server_timing_has_the_time_of_each_stage(path: str, server: Server) -> None:
    body = make_v1_request(CAT) if path.startswith("/v1") else json.dumps({"inputs": [make_image_input(CAT)]})

    response = server.post(path, body)

    durations = dict(re.findall(r"(\w+);dur=(\d+\.\d{3})", response.headers["server-timing"]))
    assert list(durations) == ["preprocess", "predict", "postprocess", "other"]
    assert all(0 < float(milliseconds) < 10_000 for milliseconds in durations.values())
