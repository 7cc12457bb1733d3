"""KServe's gRPC service, message bytes and metadata in and message bytes out, whichever server carries them."""

from __future__ import annotations

from betterproto2 import which_one_of

from pinnace.errors import InvalidInput
from pinnace.grpc.service import Metadata, Service, parse, parse_text
from pinnace.inference.dataplane import DataPlane
from pinnace.predictor import Request, RequestedOutput, Response
from pinnace.proto.generated import inference as pb
from pinnace.proto.wire import MAX_FIELDS
from pinnace.tensors import Tensor, TensorSpec, raw_of_tensor, tensor_of_raw, tensor_of_values
from pinnace.version import NAME, __version__

SERVICE = "inference.GRPCInferenceService"
MODEL_NAME = 1  # the number of the field in ModelInferRequest

# The field of InferTensorContents that carries a datatype. FP16 has none: it travels raw.
CONTENTS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{name: f"{name.lower()}_contents" for name in ("BOOL", "INT64", "UINT64", "FP32", "FP64", "BYTES")},
}


class InferenceService(Service):
    """The methods of the Open Inference Protocol, and of its repository extension."""

    names = (SERVICE,)

    def __init__(self, dataplane: DataPlane) -> None:
        self._dataplane = dataplane
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
        return bytes(pb.ServerReadyResponse(ready=self._dataplane.repository.ready))

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
                # The message has no room of its own for a warning.
                platform=f"{metadata.platform}; {metadata.warning}" if metadata.warning else metadata.platform,
                inputs=[_specification(spec) for spec in metadata.inputs],
                outputs=[_specification(spec) for spec in metadata.outputs],
            )
        )

    async def _model_infer(self, message: bytes, metadata: Metadata) -> bytes:
        with self._dataplane.counted("grpc"), self._dataplane.bodies.held(len(message)):
            self._dataplane.metrics.received("grpc", len(message))
            name = parse_text(pb.ModelInferRequest, message, MODEL_NAME)
            exchange = _Exchange(name, message, metadata)
            answer, _ = await self._dataplane.infer(name, exchange.decode, exchange.encode)
            self._dataplane.metrics.sent("grpc", len(answer))
            return answer

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


class _Exchange:
    """One ModelInfer: the response is typed or raw as the request was, which KServe's clients rely on."""

    def __init__(self, model_name: str, message: bytes, metadata: Metadata) -> None:
        self._model_name = model_name
        self._message = message
        self._metadata = metadata
        self._raw = False

    def decode(self) -> Request:
        """Raises InvalidInput."""
        message = parse(pb.ModelInferRequest, self._message, MAX_FIELDS)
        raw_contents = message.raw_input_contents
        self._raw = bool(raw_contents)
        if not self._raw:
            inputs = [_typed(tensor) for tensor in message.inputs]
        elif len(raw_contents) != len(message.inputs):
            raise InvalidInput(
                f"the number of inputs ({len(message.inputs)}) does not match the expected number of raw input "
                f"contents ({len(raw_contents)}) for model '{self._model_name}'."
            )
        else:
            inputs = [_raw(tensor, raw) for tensor, raw in zip(message.inputs, raw_contents, strict=True)]
        outputs = tuple(_requested(output) for output in message.outputs)
        return Request(self._model_name, tuple(inputs), message.id, outputs, headers=self._metadata)

    def encode(self, response: Response) -> bytes:
        message = pb.ModelInferResponse(model_name=response.model_name, id=response.id)
        raw = self._raw or any(tensor.datatype not in CONTENTS for tensor in response.outputs)
        for tensor in response.outputs:
            output = pb.ModelInferResponseInferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape)
            )
            if raw:
                contents = raw_of_tensor(tensor)
                output.parameters["binary_data_size"] = pb.InferParameter(int64_param=len(contents))
                message.raw_output_contents.append(contents)
            else:
                values = tensor.array.reshape(-1).tolist()
                output.contents = pb.InferTensorContents(**{CONTENTS[tensor.datatype]: values})
            message.outputs.append(output)
        return bytes(message)


def _typed(tensor: pb.ModelInferRequestInferInputTensor) -> Tensor:
    if tensor.datatype == "FP16":
        raise InvalidInput(f"input '{tensor.name}': FP16 travels in raw_input_contents only")
    contents = tensor.contents or pb.InferTensorContents()
    values = getattr(contents, CONTENTS.get(tensor.datatype, "bytes_contents"))
    return tensor_of_values(tensor.name, tensor.datatype, tensor.shape, values)


def _raw(tensor: pb.ModelInferRequestInferInputTensor, raw: bytes) -> Tensor:
    if tensor.contents is not None:
        raise InvalidInput(
            f"contents field must not be specified when using raw_input_contents for input '{tensor.name}'"
        )
    return tensor_of_raw(tensor.name, tensor.datatype, tensor.shape, raw)


def _requested(output: pb.ModelInferRequestInferRequestedOutputTensor) -> RequestedOutput:
    values = {name: which_one_of(parameter, "parameter_choice")[1] for name, parameter in output.parameters.items()}
    return RequestedOutput(output.name, values)


def _specification(spec: TensorSpec) -> pb.ModelMetadataResponseTensorMetadata:
    return pb.ModelMetadataResponseTensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))
