"""pinnace/grpc: inference and metadata over gRPC, called with google.protobuf's messages and grpcio."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import grpc
import h2.errors
import h2.events
import numpy as np
import pytest

from bench.server_process import memory_mib
from pinnace.grpc.inference import SERVICE
from pinnace.settings import MIB
from pinnace.version import __version__
from tests.support.clients import call_grpc, make_image_request, make_tensor_request, make_v1_request
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS
from tests.support.raw_grpc import RawConnection
from tests.support.reference import preprocess_with_torchvision
from tests.support.servers import Server, run_server

if TYPE_CHECKING:
    from model_export.source import Source

WATCH = "/grpc.health.v1.Health/Watch"
PING_SECONDS = 1.1


def expect_error(channel: grpc.Channel, google: ModuleType, method: str, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as error:
        call_grpc(channel, google, method, request)
    return error.value.code().name, error.value.details() or ""


def predict_logits(server: Server, *pictures: bytes) -> Any:
    return server.predict(make_v1_request(*pictures)).json()["predictions"]


@pytest.mark.parametrize("shape", [[1], []])
def test_an_image_gets_the_answer_of_rest_with_or_without_a_shape(
    shape: list[int], channel: grpc.Channel, google: ModuleType, server: Server
) -> None:
    answer = call_grpc(channel, google, "ModelInfer", make_image_request(google, CAT, shape=shape))

    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("output-0", "FP32", [1, 5])
    assert [list(output.contents.fp32_contents)] == predict_logits(server, CAT)
    assert answer.model_name == "custom-model"
    assert not answer.raw_output_contents


def test_an_input_without_a_shape_on_the_wire_is_one_image(channel: grpc.Channel, google: ModuleType) -> None:
    message = make_image_request(google, CAT, shape=[]).SerializeToString()

    assert message.startswith(b"\x0a\x0ccustom-model\x2a")
    assert (
        b"\x0a\x07input-0\x12\x05BYTES\x2a" in message[:40]
    )  # the contents follow the datatype: there is no shape between
    assert len(call_grpc(channel, google, "ModelInfer", google.ModelInferRequest.FromString(message)).outputs) == 1


def test_every_bytes_element_is_a_row(channel: grpc.Channel, google: ModuleType, server: Server) -> None:
    pictures = list(PHOTOGRAPHS.values())[:3]

    (output,) = call_grpc(channel, google, "ModelInfer", make_image_request(google, *pictures)).outputs

    assert list(output.shape) == [3, 5]
    rows = np.array(output.contents.fp32_contents).reshape(3, 5)
    np.testing.assert_allclose(rows, predict_logits(server, *pictures), rtol=0, atol=1e-5)


def test_raw_bytes_elements_are_images_with_length_prefixes(
    channel: grpc.Channel, google: ModuleType, server: Server
) -> None:
    request = make_image_request(google, shape=[2])
    request.inputs[0].ClearField("contents")
    pictures = (CAT, MODES["JPEG"])
    request.raw_input_contents.append(b"".join(len(picture).to_bytes(4, "little") + picture for picture in pictures))

    answer = call_grpc(channel, google, "ModelInfer", request)

    rows = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, 5)
    np.testing.assert_allclose(rows, predict_logits(server, *pictures), rtol=0, atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_a_preprocessed_batch_gets_typed_or_raw_outputs_as_its_request_is_typed_or_raw(
    raw: bool, channel: grpc.Channel, google: ModuleType, server: Server, original: Source
) -> None:
    pictures = list(PHOTOGRAPHS.values())[:4]
    pixels = np.stack([preprocess_with_torchvision(original, picture) for picture in pictures])

    answer = call_grpc(channel, google, "ModelInfer", make_tensor_request(google, pixels, raw))

    (output,) = answer.outputs
    assert list(output.shape) == [4, 5]
    if raw:
        assert output.parameters["binary_data_size"].int64_param == 80
        assert not output.contents.fp32_contents
        values = np.frombuffer(answer.raw_output_contents[0], "<f4")
    else:
        assert not answer.raw_output_contents
        values = np.array(output.contents.fp32_contents)
    np.testing.assert_allclose(values.reshape(4, 5), predict_logits(server, *pictures), rtol=0, atol=1e-4)


@pytest.mark.parametrize("raw", [False, True])
def test_the_requested_outputs_are_returned_in_order(
    raw: bool, channel: grpc.Channel, google: ModuleType, server: Server, original: Source
) -> None:
    request = make_tensor_request(google, preprocess_with_torchvision(original, CAT)[None], raw)
    for name in ("labels", "indices", "logits"):
        request.outputs.add(name=name)
    request.outputs.add(name="output-0").parameters["classification"].int64_param = 1

    answer = call_grpc(channel, google, "ModelInfer", request)

    assert [(output.name, output.datatype, list(output.shape)) for output in answer.outputs] == [
        ("labels", "BYTES", [1, 5]),
        ("indices", "INT64", [1, 5]),
        ("logits", "FP32", [1, 1000]),
        ("output-0", "BYTES", [1, 1]),
    ]
    if raw:
        indices = np.frombuffer(answer.raw_output_contents[1], "<i8").tolist()
        labels = answer.raw_output_contents[0]
        assert labels == b"".join(len(label).to_bytes(4, "little") + label for label in get_labels(original, indices))
    else:
        indices = list(answer.outputs[1].contents.int64_contents)
        assert list(answer.outputs[0].contents.bytes_contents) == get_labels(original, indices)
        (found,) = answer.outputs[3].contents.bytes_contents
        assert found.decode().endswith(f":{indices[0]}:{original.labels[indices[0]]}")


def get_labels(original: Source, indices: list[int]) -> list[bytes]:
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
def test_typed_contents_of_every_datatype_are_passed_to_the_predictor_and_returned(
    datatype: str, field: str, values: list[Any], google: ModuleType
) -> None:
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(values)

    with (
        run_server("--predictor=tests.support.predictors:Echo") as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        (output,) = call_grpc(channel, google, "ModelInfer", request).outputs

    assert (output.datatype, list(getattr(output.contents, field))) == (datatype, values)


def test_fp16_is_sent_and_returned_as_raw_contents(google: ModuleType) -> None:
    request = google.ModelInferRequest(model_name="custom-model")
    request.inputs.add(name="x", datatype="FP16", shape=[2])
    request.raw_input_contents.append(np.array([1, 2], np.float16).tobytes())

    with (
        run_server("--predictor=tests.support.predictors:Echo") as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        answer = call_grpc(channel, google, "ModelInfer", request)

    assert (answer.outputs[0].datatype, list(answer.raw_output_contents)) == ("FP16", list(request.raw_input_contents))


def test_the_server_metadata_has_the_version(channel: grpc.Channel, google: ModuleType) -> None:
    answer = call_grpc(channel, google, "ServerMetadata", google.ServerMetadataRequest())

    assert (answer.name, answer.version, list(answer.extensions)) == ("pinnace", __version__, ["classification"])


def test_the_model_metadata_has_its_tensors_and_warns_of_seeded_weights(
    channel: grpc.Channel, google: ModuleType
) -> None:
    answer = call_grpc(channel, google, "ModelMetadata", google.ModelMetadataRequest(name="custom-model"))

    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in answer.inputs] == [
        ("input-0", "BYTES", [-1])
    ]
    assert [(output.name, output.datatype, list(output.shape)) for output in answer.outputs] == [
        ("output-0", "FP32", [-1, 5]),
        ("indices", "INT64", [-1, 5]),
        ("probabilities", "FP32", [-1, 5]),
        ("labels", "BYTES", [-1, 5]),
        ("logits", "FP32", [-1, 1000]),
    ]
    assert answer.platform.startswith("onnxruntime_onnx; UNTRAINED WEIGHTS (seeded:0)")


def make_bad_requests(google: ModuleType) -> dict[str, Any]:
    """Return invalid requests by the beginning of their error text."""
    two_raw = make_image_request(google, shape=[1])
    two_raw.inputs[0].ClearField("contents")
    two_raw.raw_input_contents.extend([b"", b""])
    both = make_image_request(google, CAT)
    both.raw_input_contents.append(b"")
    cut = make_image_request(google, shape=[1])
    cut.inputs[0].ClearField("contents")
    cut.raw_input_contents.append(b"\xff\0\0\0abc")
    fp16 = make_image_request(google, CAT)
    fp16.inputs[0].datatype = "FP16"
    unknown = make_image_request(google, CAT)
    unknown.inputs[0].datatype = "bytes"
    pixels = np.zeros((1, 3, 224, 225), np.float32)
    return {
        "the request has no instances": google.ModelInferRequest(model_name="custom-model"),
        "input 'input-0', row 0: neither an image": make_image_request(google, b"hello"),
        "input 'input-0', row 1: a truncated, damaged or unsupported image": make_image_request(
            google, CAT, CAT[:5000]
        ),
        "input 'input-0': its shape does not match the 2 values that were sent": make_image_request(
            google, CAT, CAT, shape=[]
        ),
        "input 'input-0': its shape must have at most 16 dimensions, none of them negative": make_image_request(
            google, CAT, shape=[-1]
        ),
        "input 'input-0': its datatype is not one of BOOL": unknown,
        "input 'input-0': FP16 can be sent in raw_input_contents only": fp16,
        "input 'input-0': its raw BYTES are truncated": cut,
        "the number of inputs (1) does not match the expected number of raw input contents (2) for model "
        "'custom-model'.": two_raw,
        "contents field must not be specified when using raw_input_contents for input 'input-0'": both,
        "input 'INPUT__0' is FP32 of shape [1, 3, 224, 225]: expected BYTES": make_tensor_request(google, pixels, True),
    }


def test_an_invalid_request_gets_invalid_argument_with_the_reason(channel: grpc.Channel, google: ModuleType) -> None:
    for text, request in make_bad_requests(google).items():
        code, details = expect_error(channel, google, "ModelInfer", request)
        assert code == "INVALID_ARGUMENT"
        assert details.startswith(text)


def test_a_message_over_the_limit_gets_resource_exhausted(channel: grpc.Channel, google: ModuleType) -> None:
    code, details = expect_error(channel, google, "ModelInfer", make_image_request(google, bytes(8 * 1024 * 1024)))

    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details


def test_a_message_just_below_the_limit_is_read(channel: grpc.Channel, google: ModuleType) -> None:
    code, details = expect_error(
        channel, google, "ModelInfer", make_image_request(google, bytes(8 * 1024 * 1024 - 100))
    )

    assert (code, details[:38]) == ("INVALID_ARGUMENT", "input 'input-0', row 0: neither an ima")


def test_a_message_is_freed_when_its_call_ends(google: ModuleType) -> None:
    large = google.ModelInferRequest(model_name="nobody", raw_input_contents=[bytes(7 * MIB)])
    with (
        run_server("--predictor=tests.support.predictors:BatchSize") as server,
        grpc.insecure_channel(server.grpc_address) as channel,
    ):
        assert expect_error(channel, google, "ModelInfer", large)[0] == "NOT_FOUND"
        before_mib = memory_mib(server.process.pid, "Rss")
        for _ in range(40):
            expect_error(channel, google, "ModelInfer", large)

        assert memory_mib(server.process.pid, "Rss") - before_mib < 100


def test_more_instances_than_max_instances_get_resource_exhausted(channel: grpc.Channel, google: ModuleType) -> None:
    status = expect_error(channel, google, "ModelInfer", make_image_request(google, *[b"x"] * 129))

    assert status == ("RESOURCE_EXHAUSTED", "129 instances exceed max_instances (128)")


def test_keep_alive_pings_end_no_call_and_no_idle_connection(server: Server) -> None:
    with RawConnection(server.grpc_port) as watching, RawConnection(server.grpc_port) as idle:
        watching.call(WATCH, b"")
        for _ in range(5):  # the fourth would end the connection
            for connection in (watching, idle):
                connection.ping()
            threading.Event().wait(PING_SECONDS)

        for connection in (watching, idle):
            connection.ping()
            assert connection.wait_for(h2.events.PingAckReceived)
            assert not connection.has_received(h2.events.ConnectionTerminated)


def test_a_flood_of_pings_ends_its_connection(server: Server) -> None:
    with RawConnection(server.grpc_port) as connection:
        for _ in range(4):  # the last three come too soon
            connection.ping()

        goaway = connection.wait_for(h2.events.ConnectionTerminated)
        assert goaway.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


def test_metadata_of_16_kib_always_pass_and_more_get_resource_exhausted(channel: grpc.Channel) -> None:
    live: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/ServerLive")

    for size_bytes in [*range(8000, 16000, 200), 16000]:
        assert live(b"", metadata=(("x-padding", "x" * size_bytes),), timeout=10) == b"\x08\x01"
    with pytest.raises(grpc.RpcError) as error:
        live(b"", metadata=(("x-padding", "x" * 17000),), timeout=10)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
