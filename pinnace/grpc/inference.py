"""KServe's gRPC inference service. Methods take the bytes of a message and return bytes, so both ports can call them.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

from betterproto2 import which_one_of

from pinnace.errors import InvalidInput
from pinnace.grpc.service import Metadata, Service, parse, parse_text
from pinnace.inference.admission import ByteBudget
from pinnace.inference.codec import EncodedRequest, EncodedResponse
from pinnace.inference.dataplane import DataPlane, run_inference
from pinnace.observability.timings import current_timings
from pinnace.predictor import Request, RequestedOutput, Response
from pinnace.proto.generated import inference as pb
from pinnace.proto.wire import MAX_FIELDS
from pinnace.tensors import Tensor, TensorSpec
from pinnace.version import NAME, __version__

SERVICE = "inference.GRPCInferenceService"
MODEL_NAME_FIELD = 1  # its number in ModelInferRequest

# The field of InferTensorContents for each datatype. FP16 has none: it is sent raw.
CONTENTS_FIELDS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{name: f"{name.lower()}_contents" for name in ("BOOL", "INT64", "UINT64", "FP32", "FP64", "BYTES")},
}


class InferenceService(Service):
    """The methods of the Open Inference Protocol, and of Triton's model repository extension."""

    names = (SERVICE,)

    def __init__(self, dataplane: DataPlane) -> None:
        self._dataplane = dataplane
        self._codec = GrpcCodec()
        self.streams = {}
        self.unary = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_model_load,
            "RepositoryModelUnload": self._repository_model_unload,
        }

    async def _server_live(self, message: bytes, _: Metadata) -> bytes:
        parse(pb.ServerLiveRequest, message)
        return bytes(pb.ServerLiveResponse(live=True))

    async def _server_ready(self, message: bytes, _: Metadata) -> bytes:
        parse(pb.ServerReadyRequest, message)
        return bytes(pb.ServerReadyResponse(ready=self._dataplane.repository.is_ready()))

    async def _model_ready(self, message: bytes, _: Metadata) -> bytes:
        name = parse(pb.ModelReadyRequest, message).name
        return bytes(pb.ModelReadyResponse(ready=self._dataplane.repository.is_ready(name)))

    async def _server_metadata(self, message: bytes, _: Metadata) -> bytes:
        parse(pb.ServerMetadataRequest, message)
        return bytes(pb.ServerMetadataResponse(name=NAME, version=__version__, extensions=self._dataplane.extensions))

    async def _model_metadata(self, message: bytes, _: Metadata) -> bytes:
        model = self._dataplane.repository.get(parse(pb.ModelMetadataRequest, message).name)
        metadata = model.metadata
        return bytes(
            pb.ModelMetadataResponse(
                name=model.name,
                # The message has no field for a warning.
                platform=f"{metadata.platform}; {metadata.warning}" if metadata.warning else metadata.platform,
                inputs=[_to_tensor_metadata(spec) for spec in metadata.inputs],
                outputs=[_to_tensor_metadata(spec) for spec in metadata.outputs],
            )
        )

    async def _model_infer(self, message: bytes, metadata: Metadata) -> bytes:
        incoming = GrpcIncomingRequest(message, metadata, self._dataplane.byte_budget)
        return await run_inference(self._dataplane, self._codec, incoming, current_timings())

    async def _repository_index(self, message: bytes, _: Metadata) -> bytes:
        only_ready = parse(pb.RepositoryIndexRequest, message).ready
        models = [
            pb.RepositoryIndexResponseModelIndex(name=model.name, state=model.state)
            for model in self._dataplane.repository.index(only_ready)
        ]
        return bytes(pb.RepositoryIndexResponse(models=models))

    async def _repository_model_load(self, message: bytes, _: Metadata) -> bytes:
        name = parse(pb.RepositoryModelLoadRequest, message).model_name
        await self._dataplane.repository.load(name)
        return bytes(pb.RepositoryModelLoadResponse(model_name=name, is_loaded=True))

    async def _repository_model_unload(self, message: bytes, _: Metadata) -> bytes:
        name = parse(pb.RepositoryModelUnloadRequest, message).model_name
        await self._dataplane.repository.unload(name)
        return bytes(pb.RepositoryModelUnloadResponse(model_name=name, is_unloaded=True))


class GrpcIncomingRequest:
    """The IncomingRequest of a ModelInfer call: its message, complete and not decoded."""

    def __init__(self, message: bytes, metadata: Metadata, byte_budget: ByteBudget) -> None:
        self.headers = metadata
        self._message = message
        self._byte_budget = byte_budget

    @property
    def model_name(self) -> str:
        """Return the name in the message, and decode nothing else: that may take milliseconds. Raises InvalidInput."""
        return parse_text(pb.ModelInferRequest, self._message, MODEL_NAME_FIELD)

    async def read(self) -> bytes:
        """Return the message, which is here."""
        return self._message

    @asynccontextmanager
    async def while_answering(self) -> AsyncIterator[None]:
        """Count the message against max_queue_bytes. Raises Overloaded."""
        with self._byte_budget.reserve(len(self._message)):
            yield

    def make_response(self, encoded: EncodedResponse) -> bytes:
        """Return the bytes of the response message."""
        return encoded.body


class GrpcCodec:
    """Translates ModelInfer messages. A response is typed or raw as its request was, which KServe's clients rely on."""

    protocol: ClassVar[str] = "grpc"

    def decode(self, encoded: EncodedRequest) -> Request:
        """Decode the tensors of a request. Raises InvalidInput."""
        message = parse(pb.ModelInferRequest, encoded.body, MAX_FIELDS)
        raw_contents = message.raw_input_contents
        if not raw_contents:
            inputs = [_from_typed_contents(tensor) for tensor in message.inputs]
        elif len(raw_contents) != len(message.inputs):
            raise InvalidInput(
                f"the number of inputs ({len(message.inputs)}) does not match the expected number of raw input "
                f"contents ({len(raw_contents)}) for model '{encoded.model_name}'."
            )
        else:
            inputs = [_from_raw_contents(tensor, raw) for tensor, raw in zip(message.inputs, raw_contents, strict=True)]
        return Request(
            encoded.model_name,
            tuple(inputs),
            message.id,
            tuple(_to_requested_output(output) for output in message.outputs),
            headers=encoded.headers,
            response_format=_ResponseFormat(is_raw=bool(raw_contents)),
        )

    def encode(self, response: Response, request: Request) -> EncodedResponse:
        """Encode the outputs, all typed or all raw. FP16 has no typed form, so a response with FP16 is raw."""
        form: _ResponseFormat = request.response_format
        message = pb.ModelInferResponse(model_name=response.model_name, id=response.id)
        is_raw = form.is_raw or any(tensor.datatype not in CONTENTS_FIELDS for tensor in response.outputs)
        for tensor in response.outputs:
            output = pb.ModelInferResponseInferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape)
            )
            if is_raw:
                contents = tensor.to_raw()
                output.parameters["binary_data_size"] = pb.InferParameter(int64_param=len(contents))
                message.raw_output_contents.append(contents)
            else:
                values = tensor.array.reshape(-1).tolist()
                output.contents = pb.InferTensorContents(**{CONTENTS_FIELDS[tensor.datatype]: values})
            message.outputs.append(output)
        return EncodedResponse(bytes(message))


@dataclass(frozen=True, slots=True)
class _ResponseFormat:
    is_raw: bool


def _from_typed_contents(tensor: pb.ModelInferRequestInferInputTensor) -> Tensor:
    if tensor.datatype == "FP16":
        raise InvalidInput(f"input '{tensor.name}': FP16 can be sent in raw_input_contents only")
    contents = tensor.contents or pb.InferTensorContents()
    values = getattr(contents, CONTENTS_FIELDS.get(tensor.datatype, "bytes_contents"))
    return Tensor.from_values(tensor.name, tensor.datatype, tensor.shape, values)


def _from_raw_contents(tensor: pb.ModelInferRequestInferInputTensor, raw: bytes) -> Tensor:
    if tensor.contents is not None:
        raise InvalidInput(
            f"contents field must not be specified when using raw_input_contents for input '{tensor.name}'"
        )
    return Tensor.from_raw(tensor.name, tensor.datatype, tensor.shape, raw)


def _to_requested_output(output: pb.ModelInferRequestInferRequestedOutputTensor) -> RequestedOutput:
    values = {name: which_one_of(parameter, "parameter_choice")[1] for name, parameter in output.parameters.items()}
    return RequestedOutput(output.name, values)


def _to_tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponseTensorMetadata:
    return pb.ModelMetadataResponseTensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))
