"""pinnace/grpc_*.py, called with google's own messages over grpcio."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from bench.subject import memory_mib
from pinnace import __version__
from pinnace.settings import MIB
from tests.conftest import grpc_call
from tests.pictures import CAT, MODES, PHOTOGRAPHS, v1_request
from tests.servers import Server, running
from tests.test_image import torchvisions_pixels

if TYPE_CHECKING:
    from model_export.source import Source


def image_request(google: ModuleType, *pictures: bytes, shape: list[int] | None = None, **fields: Any) -> Any:
    request = google.ModelInferRequest(**{"model_name": "custom-model", **fields})
    tensor = request.inputs.add(name="input-0", datatype="BYTES", shape=[len(pictures)] if shape is None else shape)
    tensor.contents.bytes_contents.extend(pictures)
    return request


def tensor_request(google: ModuleType, pixels: Any, raw: bool) -> Any:
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="INPUT__0", datatype="FP32", shape=pixels.shape)
    if raw:
        request.raw_input_contents.append(pixels.tobytes())
        tensor.parameters["binary_data_size"].int64_param = pixels.nbytes
    else:
        tensor.contents.fp32_contents.extend(pixels.reshape(-1))
    return request


def error_of(channel: grpc.Channel, google: ModuleType, method: str, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as error:
        grpc_call(channel, google, method, request)
    return error.value.code().name, error.value.details() or ""


def rest_answer(server: Server, *pictures: bytes) -> Any:
    return server.predict(v1_request(*pictures)).json()["predictions"]


@pytest.mark.parametrize("shape", [[1], []])
def test_an_image_is_answered_as_over_rest_with_or_without_a_shape(
    shape: list[int], channel: grpc.Channel, google: ModuleType, server: Server
) -> None:
    answer = grpc_call(channel, google, "ModelInfer", image_request(google, CAT, shape=shape))

    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("output-0", "FP32", [1, 5])
    assert [list(output.contents.fp32_contents)] == rest_answer(server, CAT)
    assert answer.model_name == "custom-model"
    assert not answer.raw_output_contents


def test_an_input_without_a_shape_on_the_wire_is_one_image(channel: grpc.Channel, google: ModuleType) -> None:
    message = image_request(google, CAT, shape=[]).SerializeToString()

    assert message.startswith(b"\x0a\x0ccustom-model\x2a")
    assert b"\x0a\x07input-0\x12\x05BYTES\x2a" in message[:40]  # from the datatype on to the contents
    assert len(grpc_call(channel, google, "ModelInfer", google.ModelInferRequest.FromString(message)).outputs) == 1


def test_every_element_of_bytes_gets_a_row(channel: grpc.Channel, google: ModuleType, server: Server) -> None:
    pictures = list(PHOTOGRAPHS.values())[:3]

    (output,) = grpc_call(channel, google, "ModelInfer", image_request(google, *pictures)).outputs

    assert list(output.shape) == [3, 5]
    rows = np.array(output.contents.fp32_contents).reshape(3, 5)
    np.testing.assert_allclose(rows, rest_answer(server, *pictures), rtol=0, atol=1e-5)


def test_raw_bytes_are_images_behind_their_lengths(channel: grpc.Channel, google: ModuleType, server: Server) -> None:
    request = image_request(google, shape=[2])
    request.inputs[0].ClearField("contents")
    pictures = (CAT, MODES["JPEG"])
    request.raw_input_contents.append(b"".join(len(one).to_bytes(4, "little") + one for one in pictures))

    answer = grpc_call(channel, google, "ModelInfer", request)

    rows = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, 5)
    np.testing.assert_allclose(rows, rest_answer(server, *pictures), rtol=0, atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_a_prepared_batch_of_four_is_answered_in_the_style_of_its_request(
    raw: bool, channel: grpc.Channel, google: ModuleType, server: Server, original: Source
) -> None:
    pictures = list(PHOTOGRAPHS.values())[:4]
    pixels = np.stack([torchvisions_pixels(original, picture) for picture in pictures])

    answer = grpc_call(channel, google, "ModelInfer", tensor_request(google, pixels, raw))

    (output,) = answer.outputs
    assert list(output.shape) == [4, 5]
    if raw:
        assert output.parameters["binary_data_size"].int64_param == 80
        assert not output.contents.fp32_contents
        values = np.frombuffer(answer.raw_output_contents[0], "<f4")
    else:
        assert not answer.raw_output_contents
        values = np.array(output.contents.fp32_contents)
    np.testing.assert_allclose(values.reshape(4, 5), rest_answer(server, *pictures), rtol=0, atol=1e-4)


@pytest.mark.parametrize("raw", [False, True])
def test_outputs_come_as_requested(
    raw: bool, channel: grpc.Channel, google: ModuleType, server: Server, original: Source
) -> None:
    request = tensor_request(google, torchvisions_pixels(original, CAT)[None], raw)
    for name in ("labels", "indices", "logits"):
        request.outputs.add(name=name)
    request.outputs.add(name="output-0").parameters["classification"].int64_param = 1

    answer = grpc_call(channel, google, "ModelInfer", request)

    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
        ("labels", "BYTES", [1, 5]),
        ("indices", "INT64", [1, 5]),
        ("logits", "FP32", [1, 1000]),
        ("output-0", "BYTES", [1, 1]),
    ]
    if raw:
        indices = np.frombuffer(answer.raw_output_contents[1], "<i8").tolist()
        labels = answer.raw_output_contents[0]
        assert labels == b"".join(len(one).to_bytes(4, "little") + one for one in labels_of(original, indices))
    else:
        indices = list(answer.outputs[1].contents.int64_contents)
        assert list(answer.outputs[0].contents.bytes_contents) == labels_of(original, indices)
        (found,) = answer.outputs[3].contents.bytes_contents
        assert found.decode().endswith(f":{indices[0]}:{original.labels[indices[0]]}")


def labels_of(original: Source, indices: list[int]) -> list[bytes]:
    return [original.labels[index].encode() for index in indices]


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-32768, 32767]),
        ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT32", "uint_contents", [0, 2**32 - 1]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("FP32", "fp32_contents", [1.5, -0.25]),
        ("FP64", "fp64_contents", [1e300, -1e-300]),
        ("BYTES", "bytes_contents", [b"", b"\xff\0"]),
    ],
)
def test_typed_contents_of_every_datatype_reach_a_predictor_and_come_back(
    datatype: str, field: str, values: list[Any], google: ModuleType
) -> None:
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(values)

    with running("--predictor=tests.predictors:Echo") as server, grpc.insecure_channel(server.grpc_address) as channel:
        (output,) = grpc_call(channel, google, "ModelInfer", request).outputs

    assert (output.datatype, list(getattr(output.contents, field))) == (datatype, values)


def test_fp16_travels_raw_in_both_directions(google: ModuleType) -> None:
    request = google.ModelInferRequest(model_name="custom-model")
    request.inputs.add(name="x", datatype="FP16", shape=[2])
    request.raw_input_contents.append(np.array([1, 2], np.float16).tobytes())

    with running("--predictor=tests.predictors:Echo") as server, grpc.insecure_channel(server.grpc_address) as channel:
        answer = grpc_call(channel, google, "ModelInfer", request)

    assert (answer.outputs[0].datatype, list(answer.raw_output_contents)) == ("FP16", list(request.raw_input_contents))


def test_the_servers_metadata_has_its_version(channel: grpc.Channel, google: ModuleType) -> None:
    answer = grpc_call(channel, google, "ServerMetadata", google.ServerMetadataRequest())

    assert (answer.name, answer.version, list(answer.extensions)) == ("pinnace", __version__, ["classification"])


def test_the_models_metadata_has_its_tensors_and_warns_of_seeded_weights(
    channel: grpc.Channel, google: ModuleType
) -> None:
    answer = grpc_call(channel, google, "ModelMetadata", google.ModelMetadataRequest(name="custom-model"))

    assert [(one.name, one.datatype, list(one.shape)) for one in answer.inputs] == [("input-0", "BYTES", [-1])]
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
        ("output-0", "FP32", [-1, 5]),
        ("indices", "INT64", [-1, 5]),
        ("probabilities", "FP32", [-1, 5]),
        ("labels", "BYTES", [-1, 5]),
        ("logits", "FP32", [-1, 1000]),
    ]
    assert answer.platform.startswith("onnxruntime_onnx; UNTRAINED WEIGHTS (seeded:0)")


def bad_requests(google: ModuleType) -> dict[str, Any]:
    """Requests that cannot be answered, by the beginning of what is said of them."""
    two_raw = image_request(google, shape=[1])
    two_raw.inputs[0].ClearField("contents")
    two_raw.raw_input_contents.extend([b"", b""])
    both = image_request(google, CAT)
    both.raw_input_contents.append(b"")
    cut = image_request(google, shape=[1])
    cut.inputs[0].ClearField("contents")
    cut.raw_input_contents.append(b"\xff\0\0\0abc")
    fp16 = image_request(google, CAT)
    fp16.inputs[0].datatype = "FP16"
    unknown = image_request(google, CAT)
    unknown.inputs[0].datatype = "bytes"
    pixels = np.zeros((1, 3, 224, 225), np.float32)
    return {
        "the request has no instances": google.ModelInferRequest(model_name="custom-model"),
        "input 'input-0', row 0: neither an image": image_request(google, b"hello"),
        "input 'input-0', row 1: a truncated, damaged or unsupported image": image_request(google, CAT, CAT[:5000]),
        "input 'input-0': its shape asks for another number of values than the 2 sent": image_request(
            google, CAT, CAT, shape=[]
        ),
        "input 'input-0': its shape has a negative": image_request(google, CAT, shape=[-1]),
        "input 'input-0': its datatype is none of BOOL": unknown,
        "input 'input-0': FP16 travels in raw_input_contents only": fp16,
        "input 'input-0': its raw BYTES are truncated": cut,
        "the number of inputs (1) does not match the expected number of raw input contents (2) for model "
        "'custom-model'.": two_raw,
        "contents field must not be specified when using raw_input_contents for input 'input-0'": both,
        "input 'INPUT__0' is FP32 of shape [1, 3, 224, 225]: neither BYTES": tensor_request(google, pixels, True),
    }


def test_a_request_that_cannot_be_answered_is_an_invalid_argument_that_names_what_is_wrong(
    channel: grpc.Channel, google: ModuleType
) -> None:
    for text, request in bad_requests(google).items():
        code, details = error_of(channel, google, "ModelInfer", request)
        assert code == "INVALID_ARGUMENT"
        assert details.startswith(text)


def test_a_message_over_the_limit_is_resource_exhausted(channel: grpc.Channel, google: ModuleType) -> None:
    code, details = error_of(channel, google, "ModelInfer", image_request(google, bytes(8 * 1024 * 1024)))

    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details


def test_a_message_of_nearly_the_limit_is_read(channel: grpc.Channel, google: ModuleType) -> None:
    code, details = error_of(channel, google, "ModelInfer", image_request(google, bytes(8 * 1024 * 1024 - 100)))

    assert (code, details[:38]) == ("INVALID_ARGUMENT", "input 'input-0', row 0: neither an ima")


def test_a_message_is_let_go_with_its_call(google: ModuleType) -> None:
    large = google.ModelInferRequest(model_name="nobody", raw_input_contents=[bytes(7 * MIB)])
    with (
        running("--predictor=tests.predictors:BatchSize") as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        assert error_of(channel, google, "ModelInfer", large)[0] == "NOT_FOUND"
        before_mib = memory_mib(server.process.pid, "Rss")
        for _ in range(40):
            error_of(channel, google, "ModelInfer", large)

        assert memory_mib(server.process.pid, "Rss") - before_mib < 100


def test_more_instances_than_allowed_are_resource_exhausted(channel: grpc.Channel, google: ModuleType) -> None:
    status = error_of(channel, google, "ModelInfer", image_request(google, *[b"x"] * 129))

    assert status == ("RESOURCE_EXHAUSTED", "129 instances exceed max_instances (128)")
