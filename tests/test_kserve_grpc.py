"""KServe's gRPC API (SDK 0.20.0, observed on the wire), row by row, on both ports. `differs` says why we differ."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from tests.support.clients import call_grpc, make_image_request, make_tensor_request
from tests.support.pictures import CAT
from tests.support.servers import Server, run_server

MODEL = "custom-model"
NO_MODEL = "Model with name nope does not exist."
PIXELS = np.zeros((2, 3, 224, 224), np.float32)

FIELDS = {
    "ServerLiveRequest": "",
    "ServerReadyRequest": "",
    "ServerMetadataRequest": "",
    "ServerLiveResponse": "live: bool=1",
    "ServerReadyResponse": "ready: bool=1",
    "ModelReadyRequest": "name: string=1; version: string=2",
    "ModelMetadataRequest": "name: string=1; version: string=2",
    "ModelReadyResponse": "ready: bool=1",
    "ServerMetadataResponse": "name: string=1; version: string=2; extensions: repeated string=3",
    "ModelMetadataResponse": "name: string=1; versions: repeated string=2; platform: string=3; "
    "inputs: repeated TensorMetadata=4; outputs: repeated TensorMetadata=5",
    "ModelMetadataResponse.TensorMetadata": "name: string=1; datatype: string=2; shape: repeated int64=3",
    "ModelInferRequest": "model_name: string=1; model_version: string=2; id: string=3; "
    "parameters: repeated ParametersEntry=4; inputs: repeated InferInputTensor=5; "
    "outputs: repeated InferRequestedOutputTensor=6; raw_input_contents: repeated bytes=7",
    "ModelInferRequest.ParametersEntry": "key: string=1; value: InferParameter=2",
    "ModelInferRequest.InferInputTensor": "name: string=1; datatype: string=2; shape: repeated int64=3; "
    "parameters: repeated ParametersEntry=4; contents: InferTensorContents=5",
    "ModelInferRequest.InferRequestedOutputTensor": "name: string=1; parameters: repeated ParametersEntry=2",
    "ModelInferResponse": "model_name: string=1; model_version: string=2; id: string=3; "
    "parameters: repeated ParametersEntry=4; outputs: repeated InferOutputTensor=5; "
    "raw_output_contents: repeated bytes=6",
    "ModelInferResponse.InferOutputTensor": "name: string=1; datatype: string=2; shape: repeated int64=3; "
    "parameters: repeated ParametersEntry=4; contents: InferTensorContents=5",
    "InferParameter": "bool_param: bool=1; int64_param: int64=2; string_param: string=3",
    "InferTensorContents": "bool_contents: repeated bool=1; int_contents: repeated int32=2; "
    "int64_contents: repeated int64=3; uint_contents: repeated uint32=4; uint64_contents: repeated uint64=5; "
    "fp32_contents: repeated float=6; fp64_contents: repeated double=7; bytes_contents: repeated bytes=8",
    "RepositoryModelLoadRequest": "model_name: string=1",
    "RepositoryModelUnloadRequest": "model_name: string=1",
    "RepositoryModelLoadResponse": "model_name: string=1; isLoaded: bool=2",
    "RepositoryModelUnloadResponse": "model_name: string=1; isUnloaded: bool=2",
}
TYPES = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def describe_fields(message: Descriptor) -> str:
    fields = []
    for field in message.fields:
        type_name = field.message_type.name if field.message_type else TYPES[field.type]
        fields.append(f"{field.name}: {'repeated ' if field.is_repeated else ''}{type_name}={field.number}")
    return "; ".join(fields)


@pytest.mark.parametrize("name", FIELDS)
def test_message_has_kserves_fields(name: str, google: ModuleType) -> None:
    message = google
    for part in name.split("."):
        message = getattr(message, part)

    assert describe_fields(message.DESCRIPTOR) == FIELDS[name]


@dataclass(frozen=True)
class Row:
    """A call. `request` makes its message; `answer` checks the response, or is status and details of the error."""

    name: str
    method: str
    request: Callable[[ModuleType], Any]
    answer: Callable[[Any], Any] | tuple[str, str]
    differs: str = ""

    def check(self, channel: grpc.Channel, google: ModuleType) -> None:
        request = self.request(google)
        if callable(self.answer):
            assert self.answer(call_grpc(channel, google, self.method, request))
            return
        with pytest.raises(grpc.RpcError) as error:
            call_grpc(channel, google, self.method, request)
        code, details = self.answer
        assert error.value.code().name == code
        assert (error.value.details() or "").startswith(details)


def make_infer_row(name: str, request: Callable[[ModuleType], Any], answer: Any, differs: str = "") -> Row:
    return Row(name, "ModelInfer", request, answer, differs)


def make_raw_request(google: ModuleType, *raw: bytes) -> Any:
    request = google.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="input-0", datatype="BYTES", shape=[1])
    request.raw_input_contents.extend(raw)
    return request


def make_request_with_both_contents(google: ModuleType) -> Any:
    request = make_image_request(google, CAT)
    request.raw_input_contents.append(b"")
    return request


def make_request_with_parameter(google: ModuleType) -> Any:
    request = make_image_request(google, CAT)
    request.parameters["a"].string_param = "b"
    return request


def make_request_with_datatype(google: ModuleType, datatype: str) -> Any:
    request = make_image_request(google, CAT)
    request.inputs[0].datatype = datatype
    return request


def make_request_with_output(google: ModuleType, name: str) -> Any:
    request = make_image_request(google, CAT)
    request.outputs.add(name=name)
    return request


def has_typed_output(response: Any) -> Any:
    (output,) = response.outputs
    return len(output.contents.fp32_contents) == 5 and not response.raw_output_contents


def has_raw_output(response: Any) -> Any:
    (output,), (contents,) = response.outputs, response.raw_output_contents
    return output.parameters["binary_data_size"].int64_param == len(contents) == 4 * output.shape[0] * output.shape[1]


SEMANTICS = [
    Row("ServerLive", "ServerLive", lambda g: g.ServerLiveRequest(), lambda r: r.live),
    Row("ServerReady", "ServerReady", lambda g: g.ServerReadyRequest(), lambda r: r.ready),
    Row("ModelReady", "ModelReady", lambda g: g.ModelReadyRequest(name=MODEL), lambda r: r.ready),
    Row("ServerMetadata", "ServerMetadata", lambda g: g.ServerMetadataRequest(), lambda r: bool(r.version)),
    Row(
        "ModelMetadata",
        "ModelMetadata",
        lambda g: g.ModelMetadataRequest(name=MODEL),
        lambda r: (r.inputs[0].datatype, list(r.outputs[0].shape), list(r.versions)) == ("BYTES", [-1, 5], []),
    ),
    make_infer_row("typed in, typed out", lambda g: make_image_request(g, CAT), has_typed_output),
    make_infer_row(
        "raw in, raw out",
        lambda g: make_raw_request(g, struct.pack("<I", len(CAT)) + CAT),
        has_raw_output,
        "no raw BYTES in KServe",
    ),
    make_infer_row("id echoed", lambda g: make_image_request(g, CAT, id="abc"), lambda r: r.id == "abc"),
    make_infer_row("id empty", lambda g: make_image_request(g, CAT), lambda r: len(r.id) == 36),
    make_infer_row("model_name echoed", lambda g: make_image_request(g, CAT), lambda r: r.model_name == MODEL),
    make_infer_row("model_version ignored", lambda g: make_image_request(g, CAT, model_version="7"), has_typed_output),
    make_infer_row("parameters not echoed", make_request_with_parameter, lambda r: not r.parameters),
    make_infer_row(
        "outputs requested",
        lambda g: make_request_with_output(g, "labels"),
        lambda r: r.outputs[0].name == "labels",
        "ignored there",
    ),
    make_infer_row(
        "unknown output",
        lambda g: make_request_with_output(g, "foo"),
        ("INVALID_ARGUMENT", f"Unexpected inference output 'foo' for model '{MODEL}'"),
        "KServe answers with all outputs: over REST it refuses, as here",
    ),
    make_infer_row(
        "raw contents without input",
        lambda g: make_raw_request(g, b"", b""),
        (
            "INVALID_ARGUMENT",
            "the number of inputs (1) does not match the expected number of raw input contents (2) "
            f"for model '{MODEL}'.",
        ),
    ),
    make_infer_row(
        "raw beside typed contents",
        make_request_with_both_contents,
        ("INVALID_ARGUMENT", "contents field must not be specified when using raw_input_contents for input 'input-0'"),
    ),
    make_infer_row(
        "datatype in lower case",
        lambda g: make_request_with_datatype(g, "bytes"),
        ("INVALID_ARGUMENT", "input 'input-0': its datatype is not one of BOOL"),
    ),
    make_infer_row(
        "typed FP16",
        lambda g: make_request_with_datatype(g, "FP16"),
        ("INVALID_ARGUMENT", "input 'input-0': FP16 can be sent in raw_input_contents only"),
    ),
]

SHAPES = [
    make_infer_row("e2e: shape [], typed BYTES", lambda g: make_image_request(g, CAT, shape=[]), has_typed_output),
    make_infer_row(
        "the tutorial's client: shape [1]", lambda g: make_image_request(g, CAT, shape=[1]), has_typed_output
    ),
    make_infer_row(
        "ImageTransformer: raw FP32 of two rows", lambda g: make_tensor_request(g, PIXELS, raw=True), has_raw_output
    ),
    make_infer_row("typed FP32", lambda g: make_tensor_request(g, PIXELS[:1], raw=False), has_typed_output),
]

HIDDEN = "INTERNAL in KServe, which hides the client's mistake"
ERRORS = [
    make_infer_row("unknown model: infer", lambda g: g.ModelInferRequest(model_name="nope"), ("NOT_FOUND", NO_MODEL)),
    Row("unknown model: ready", "ModelReady", lambda g: g.ModelReadyRequest(name="nope"), ("NOT_FOUND", NO_MODEL)),
    Row(
        "no model name: ready",
        "ModelReady",
        lambda g: g.ModelReadyRequest(),
        ("NOT_FOUND", "Model with name  does not exist."),
    ),
    Row(
        "unknown model: metadata",
        "ModelMetadata",
        lambda g: g.ModelMetadataRequest(name="nope"),
        ("NOT_FOUND", NO_MODEL),
    ),
    Row(
        "load when off",
        "RepositoryModelLoad",
        lambda g: g.RepositoryModelLoadRequest(model_name=MODEL),
        ("UNIMPLEMENTED", "The model repository is off"),
        "KServe's own are broken: INTERNAL even where they succeed",
    ),
    make_infer_row(
        "bad image",
        lambda g: make_image_request(g, b"hello"),
        ("INVALID_ARGUMENT", "input 'input-0', row 0: neither"),
        HIDDEN,
    ),
    make_infer_row(
        "wrong shape",
        lambda g: make_tensor_request(g, PIXELS[:, :1], raw=True),
        ("INVALID_ARGUMENT", "input 'INPUT__0' is FP32 of shape [2, 1, 224, 224]"),
        HIDDEN,
    ),
    make_infer_row(
        "no inputs",
        lambda g: g.ModelInferRequest(model_name=MODEL),
        ("INVALID_ARGUMENT", "the request has no instances"),
        HIDDEN,
    ),
    make_infer_row(
        "over the receive limit",
        lambda g: make_image_request(g, bytes(8 * 2**20)),
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (83886"),
    ),
]


@pytest.mark.parametrize("row", SEMANTICS, ids=lambda row: row.name)
def test_semantics(row: Row, channel: grpc.Channel, google: ModuleType) -> None:
    row.check(channel, google)


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: row.name)
def test_request_of_a_real_client(row: Row, channel: grpc.Channel, google: ModuleType) -> None:
    row.check(channel, google)


@pytest.mark.parametrize("row", ERRORS, ids=lambda row: row.name)
def test_error(row: Row, channel: grpc.Channel, google: ModuleType) -> None:
    row.check(channel, google)


@pytest.fixture(scope="module")
def failing() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Failing") as server:
        yield server


@pytest.mark.parametrize(
    ("raised", "code", "details"),
    [
        ("InvalidInput", "INVALID_ARGUMENT", "the secret of the text"),
        ("RuntimeError", "INTERNAL", "Internal server error"),
        ("NotSupported", "UNIMPLEMENTED", "the secret of the text"),
        ("NotImplementedError", "INTERNAL", "Internal server error"),
    ],
)
def test_error_of_the_handler(raised: str, code: str, details: str, failing: Server, google: ModuleType) -> None:
    """NotImplementedError and ModelNotReady are UNKNOWN in KServe, by a bug of its interceptor."""
    with grpc.insecure_channel(failing.grpc_address) as channel:
        make_infer_row("", lambda g: make_image_request(g, raised.encode()), (code, details)).check(channel, google)


def test_model_not_ready(google: ModuleType) -> None:
    """KServe loads the model on the event loop and runs the request; its ServerReady is always true."""
    with run_server("--predictor=tests.support.predictors:Echo", "--enable_model_repository=true") as server:
        server.post(f"/v2/repository/models/{MODEL}/unload", "")
        with grpc.insecure_channel(server.grpc_address) as channel:
            not_ready = ("UNAVAILABLE", f"Model with name {MODEL} is not ready.")
            make_infer_row("", lambda g: make_image_request(g, CAT), not_ready).check(channel, google)
            assert not call_grpc(channel, google, "ModelReady", google.ModelReadyRequest(name=MODEL)).ready
            assert not call_grpc(channel, google, "ServerReady", google.ServerReadyRequest()).ready


@pytest.mark.parametrize(
    ("message", "method", "code", "details"),
    [
        (
            b"\x0a\xff",
            "inference.GRPCInferenceService/ModelInfer",
            "INVALID_ARGUMENT",
            "not a ModelInferRequest message",
        ),
        (b"", "inference.GRPCInferenceService/Nope", "UNIMPLEMENTED", "Method not found!"),
        (b"", "no.such.Service/Method", "UNIMPLEMENTED", "Method not found!"),
    ],
    ids=["undecodable protobuf: UNKNOWN in KServe", "unknown method", "unknown service"],
)
def test_malformed_call(message: bytes, method: str, code: str, details: str, channel: grpc.Channel) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{method}")

    with pytest.raises(grpc.RpcError) as error:
        call(message, timeout=60)

    assert error.value.code().name == code
    assert (error.value.details() or "").startswith(details)


def test_the_response_has_no_metadata(channel: grpc.Channel, google: ModuleType) -> None:
    call: grpc.UnaryUnaryMultiCallable[Any, bytes] = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", request_serializer=lambda message: message.SerializeToString()
    )

    _, done = call.with_call(make_image_request(google, CAT), timeout=60, metadata=(("request_type", "grpc_v2"),))

    assert not [key for key, _ in done.trailing_metadata() or ()]
    assert "prediction-time-latency" not in dict(done.initial_metadata() or ())


@pytest.mark.parametrize("port", ["grpc_port", "http_port"])
def test_a_call_with_an_empty_authority_as_the_tutorials_client_sends_it_is_answered(
    port: str, server: Server, google: ModuleType
) -> None:
    options = [("grpc.ssl_target_name_override", "")]
    with grpc.insecure_channel(f"127.0.0.1:{getattr(server, port)}", options) as channel:
        assert has_typed_output(call_grpc(channel, google, "ModelInfer", make_image_request(google, CAT)))
