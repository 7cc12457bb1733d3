"""The codecs alone: requests to tensors, and responses in the form that the request wants."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest

from pinnace.errors import InvalidInput, TooLarge, UnsupportedMediaType
from pinnace.grpc.inference import GrpcCodec
from pinnace.http.v1 import V1Codec
from pinnace.http.v2 import JSON_LENGTH_HEADER, V2Codec
from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import EncodedRequest
from pinnace.observability.timings import RequestTimings
from pinnace.predictor import Response
from pinnace.proto.generated import inference as pb
from pinnace.settings import Settings
from pinnace.tensors import Tensor, TensorSpec

V1 = V1Codec(Settings())
V2 = V2Codec()
GRPC = GrpcCodec()

LOGITS = Tensor("logits", np.array([[1.5, 2.5]], np.float32))
LABELS = Tensor("labels", np.array([[b"cat", b"dog"]], object))


def v1(content: Any, **headers: str) -> EncodedRequest:
    return EncodedRequest("m", json.dumps(content).encode(), headers)


def v2(content: Any, binary: bytes = b"") -> EncodedRequest:
    header = json.dumps(content).encode()
    headers = {JSON_LENGTH_HEADER: str(len(header))} if binary else {}
    return EncodedRequest("m", header + binary, headers)


def test_v1_instances_become_one_tensor_with_a_row_each() -> None:
    request = V1.decode(v1({"instances": [[1, 2], [3, 4]]}))

    assert (request.input.name, request.input.datatype, request.input.shape) == ("instances", "INT64", (2, 2))
    assert request.num_instances == 2


def test_v1_instances_that_are_objects_become_a_tensor_per_key() -> None:
    request = V1.decode(v1({"instances": [{"city": "Kyiv", "age": 32}, {"city": "Lviv", "age": 40}]}))

    assert {tensor.name: tensor.array.tolist() for tensor in request.inputs} == {
        "city": [b"Kyiv", b"Lviv"],
        "age": [32, 40],
    }


def test_v1_base64_is_decoded_and_a_wrong_one_is_named() -> None:
    encoded = base64.b64encode(b"\x89PNG").decode()
    assert V1.decode(v1({"instances": [{"b64": encoded}]})).input.array.tolist() == [b"\x89PNG"]
    with pytest.raises(InvalidInput, match=r"instances\[1\]\.b64: not valid base64"):
        V1.decode(v1({"instances": [{"b64": encoded}, {"b64": "!"}]}))


def test_v1_refuses_too_many_instances_before_it_decodes_them() -> None:
    with pytest.raises(TooLarge, match=r"3 instances exceed max_instances \(2\)"):
        V1Codec(Settings(max_instances=2)).decode(v1({"instances": [{"b64": "!"}, [1], [1, 2]]}))


@pytest.mark.parametrize("body", [b"\xff\xd8\xff", b""])
def test_a_v1_image_body_is_one_instance_as_it_is(body: bytes) -> None:
    request = V1.decode(EncodedRequest("m", body, {"content-type": "image/jpeg"}))

    assert (request.input.array.tolist(), request.num_instances) == ([body], 1)


def test_a_v1_response_with_one_output_has_its_rows_and_with_several_an_object_per_row() -> None:
    request = V1.decode(v1({"instances": [1]}))

    one_output, several = V1.encode(Response([LOGITS]), request), V1.encode(Response([LOGITS, LABELS]), request)

    assert json.loads(one_output.body) == {"predictions": [[1.5, 2.5]]}
    assert json.loads(several.body) == {"predictions": [{"logits": [1.5, 2.5], "labels": ["cat", "dog"]}]}
    assert one_output.headers == {"content-type": "application/json"}


def test_a_v1_request_in_a_cloudevent_is_answered_in_one() -> None:
    event = {"specversion": "1.0", "id": "1", "source": "here", "type": "there", "data": {"instances": [1]}}
    request = V1.decode(v1(event, **{"content-type": "application/cloudevents+json"}))

    assert "data" not in request.response_format.envelope.attributes
    response = V1.encode(Response([LOGITS], model_name="m"), request)

    content = json.loads(response.body)
    assert content["data"] == {"predictions": [[1.5, 2.5]]}
    assert content["source"] == "io.kserve.inference.m"
    assert response.headers["content-type"] == "application/cloudevents+json"


@pytest.mark.parametrize(
    ("codec", "content_type", "is_taken"),
    [
        (V1, "application/json", True),
        (V1, "image/png", True),
        (V1, "video/mp4", False),
        (V2, "application/json; charset=utf-8", True),
        (V2, "image/png", False),
    ],
)
def test_a_codec_knows_from_the_headers_what_it_can_decode(
    codec: V1Codec | V2Codec, content_type: str, is_taken: bool
) -> None:
    if is_taken:
        codec.check_headers({"content-type": content_type})
    else:
        with pytest.raises(UnsupportedMediaType):
            codec.check_headers({"content-type": content_type})


def test_v2_tensors_are_numbers_in_the_json_or_bytes_behind_it() -> None:
    raw = np.array([1.5, 2.5], np.float32).tobytes()
    request = V2.decode(
        v2(
            {
                "id": "7",
                "inputs": [
                    {"name": "a", "datatype": "INT32", "shape": [2, 1], "data": [[1], [2]]},
                    {"name": "b", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": len(raw)}},
                ],
            },
            raw,
        )
    )

    assert request.id == "7"
    assert [tensor.array.tolist() for tensor in request.inputs] == [[[1], [2]], [1.5, 2.5]]


def test_a_v2_response_has_each_output_in_the_form_that_was_requested() -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "labels"}]
    inputs = [{"name": "a", "datatype": "INT32", "shape": [1], "data": [1]}]
    request = V2.decode(v2({"inputs": inputs, "outputs": outputs}))

    response = V2.encode(Response([LOGITS, LABELS], model_name="m", id="7"), request)

    length = int(response.headers[JSON_LENGTH_HEADER])
    logits, labels = json.loads(response.body[:length])["outputs"]
    assert (logits["parameters"], "data" in logits) == ({"binary_data_size": 8}, False)
    assert labels["data"] == ["cat", "dog"]
    assert struct.unpack("<2f", response.body[length:]) == (1.5, 2.5)


def test_v2_refuses_fp16_in_json() -> None:
    request = V2.decode(v2({"inputs": [{"name": "a", "datatype": "INT32", "shape": [1], "data": [1]}]}))

    with pytest.raises(InvalidInput, match="FP16"):
        V2.encode(Response([Tensor("half", np.zeros(1, np.float16))]), request)


@pytest.mark.parametrize("is_raw", [False, True])
def test_a_grpc_response_is_typed_or_raw_as_its_request_was(is_raw: bool) -> None:
    tensor = pb.ModelInferRequestInferInputTensor(name="a", datatype="FP32", shape=[1, 2])
    values = np.array([1.0, 2.0], np.float32)
    if not is_raw:
        tensor.contents = pb.InferTensorContents(fp32_contents=values.tolist())
    message = pb.ModelInferRequest(
        model_name="m", inputs=[tensor], raw_input_contents=[values.tobytes()] if is_raw else []
    )
    request = GRPC.decode(EncodedRequest("m", bytes(message)))
    assert request.input.array.tolist() == [[1.0, 2.0]]

    response = pb.ModelInferResponse().parse(GRPC.encode(Response([LOGITS], model_name="m", id="7"), request).body)

    (output,) = response.outputs
    if is_raw:
        assert response.raw_output_contents == [LOGITS.array.tobytes()]
    else:
        assert output.contents
        assert output.contents.fp32_contents == [1.5, 2.5]


def test_a_grpc_response_with_fp16_is_raw_although_its_request_was_typed() -> None:
    tensor = pb.ModelInferRequestInferInputTensor(name="a", datatype="INT64", shape=[1])
    tensor.contents = pb.InferTensorContents(int64_contents=[1])
    request = GRPC.decode(EncodedRequest("m", bytes(pb.ModelInferRequest(model_name="m", inputs=[tensor]))))

    response = pb.ModelInferResponse().parse(
        GRPC.encode(Response([Tensor("h", np.zeros(1, np.float16))]), request).body
    )

    assert response.raw_output_contents == [b"\0\0"]


@pytest.mark.parametrize("codec", [V1, V2, GRPC])
def test_random_bytes_are_refused_as_invalid_input(codec: Any) -> None:
    for seed in range(50):
        body = np.random.default_rng(seed).bytes(40)
        with pytest.raises(InvalidInput):
            codec.decode(EncodedRequest("m", body))


SPECS = [TensorSpec("x", "INT64", (-1,))]


def call(rows: int) -> InferenceCall:
    return InferenceCall(V1, v1({"instances": [1] * rows}), RequestTimings())


def test_a_call_counts_the_rows_of_its_request_for_its_permit() -> None:
    decoded = call(3)
    request = decoded.decode(SPECS, Settings(max_instances=3))

    assert decoded.permit.num_rows == 3
    assert decoded.request is request
    assert len(request.id) == 36  # a UUID, since the client sent no id


def test_a_call_with_more_rows_than_allowed_is_refused() -> None:
    with pytest.raises(TooLarge, match=r"4 instances exceed max_instances \(3\)"):
        call(4).decode(SPECS, Settings(max_instances=3))


def test_a_call_without_rows_is_refused() -> None:
    empty = v2({"inputs": [{"name": "x", "datatype": "INT64", "shape": [0], "data": []}]})
    with pytest.raises(InvalidInput, match="the request has no instances"):
        InferenceCall(V2, empty, RequestTimings()).decode(SPECS, Settings(max_instances=3))
