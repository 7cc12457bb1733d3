"""The Open Inference Protocol over REST, also called V2: inference, and metadata of the server and its models.

Tensors travel in the JSON as numbers or, with Triton's binary data extension, behind it as bytes.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.errors import InvalidInput, NotSupported
from pinnace.http.inference import infer
from pinnace.http.json import dump_json, parse_json
from pinnace.http.request import check_content_type
from pinnace.http.response import json_response
from pinnace.inference.codec import EncodedRequest, EncodedResponse
from pinnace.inference.dataplane import DataPlane
from pinnace.predictor import Request, RequestedOutput, Response
from pinnace.tensors import Tensor
from pinnace.version import NAME, __version__

JSON_LENGTH_HEADER = "inference-header-content-length"
FP16_IN_JSON = "Sending FP16 data via JSON is not supported. Please use the binary data format for {}"  # KServe's text


def routes(dataplane: DataPlane) -> list[Route]:
    """Return the routes of V2 inference and metadata."""

    async def server_metadata(_: HttpRequest) -> HttpResponse:
        return json_response(
            {"name": NAME, "version": __version__, "extensions": ["binary_tensor_data", *dataplane.extensions]}
        )

    async def model_metadata(request: HttpRequest) -> HttpResponse:
        model = dataplane.repository.get(request.path_params["model"])
        metadata = model.metadata
        content: dict[str, Any] = {
            "name": model.name,
            "versions": None,
            "platform": metadata.platform,
            "inputs": [asdict(spec) for spec in metadata.inputs],
            "outputs": [asdict(spec) for spec in metadata.outputs],
        }
        if metadata.properties:
            content["properties"] = metadata.properties
        if metadata.warning:
            content["warning"] = metadata.warning
        return json_response(content)

    async def version(_: HttpRequest) -> HttpResponse:
        raise NotSupported("Model versioning not supported yet.")

    return [
        Route("/v2", server_metadata),
        Route("/v2/models/{model}", model_metadata),
        Route("/v2/models/{model}/infer", partial(infer, dataplane, V2Codec()), methods=["POST"]),
        Route("/v2/models/{model}/versions/{version}", version),
        Route("/v2/models/{model}/versions/{version}/ready", version),
        Route("/v2/models/{model}/versions/{version}/infer", version, methods=["POST"]),
    ]


@dataclass(frozen=True, slots=True)
class _ResponseFormat:
    """The form of a response: outputs that `outputs` maps to True are binary; `is_binary` decides for all others."""

    is_binary: bool
    outputs: Mapping[str, bool]


class V2Codec:
    """Translates V2 bodies: JSON, with tensors in it as numbers or behind it as bytes."""

    protocol: ClassVar[str] = "v2"

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Raise UnsupportedMediaType unless the headers declare uncompressed JSON.

        With Inference-Header-Content-Length any content type passes: `decode` then takes the JSON by that length.
        """
        if JSON_LENGTH_HEADER not in headers:
            check_content_type(headers)

    def decode(self, encoded: EncodedRequest) -> Request:
        """Decode the tensors of a request. Raises InvalidInput and TooLarge."""
        json_bytes = _get_json_length(encoded)
        payload = parse_json(encoded.body[:json_bytes])
        if not isinstance(payload, dict):
            raise InvalidInput('the body must be a JSON object with "inputs"')
        binary_data = _BinaryData(memoryview(encoded.body)[json_bytes:])
        inputs = [
            _decode_input(item, path, binary_data, encoded.model_name) for item, path in _get_items(payload, "inputs")
        ]
        if not inputs:
            raise InvalidInput('"inputs" is missing or empty')
        binary_data.check_consumed()
        is_binary = _get_parameters(payload, "the request").get("binary_data_output") is True
        outputs = [
            RequestedOutput(_get_text(item, "name", path), _get_parameters(item, path))
            for item, path in _get_items(payload, "outputs")
        ]
        identifier = payload.get("id") or ""
        if not isinstance(identifier, str):
            raise InvalidInput('"id" must be a string')
        return Request(
            encoded.model_name,
            tuple(inputs),
            identifier,
            tuple(outputs),
            headers=encoded.headers,
            response_format=_ResponseFormat(
                is_binary, {output.name: output.parameters.get("binary_data", is_binary) is True for output in outputs}
            ),
        )

    def encode(self, response: Response, request: Request) -> EncodedResponse:
        """Encode the outputs as the request wants them. Raises InvalidInput for FP16 in JSON."""
        form: _ResponseFormat = request.response_format
        outputs, binary_data = [], []
        for tensor in response.outputs:
            output: dict[str, Any] = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype}
            if form.outputs.get(tensor.name, form.is_binary):
                binary_data.append(tensor.to_raw())
                output["parameters"] = {"binary_data_size": len(binary_data[-1])}
            elif tensor.datatype == "FP16":
                raise InvalidInput(FP16_IN_JSON.format(f"output {tensor.name}"))
            else:
                output |= {"parameters": None, "data": tensor.array.reshape(-1).tolist()}
            outputs.append(output)
        content = {
            "model_name": response.model_name,
            "model_version": None,
            "id": response.id,
            "parameters": None,
            "outputs": outputs,
        }
        json_part = dump_json(content)
        if not binary_data:
            return EncodedResponse(json_part, {**response.headers, "content-type": "application/json"})
        headers = {"content-type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(json_part))}
        return EncodedResponse(b"".join([json_part, *binary_data]), {**response.headers, **headers})


class _BinaryData:
    """The bytes behind the JSON, which the inputs take from the front."""

    def __init__(self, raw: memoryview) -> None:
        self._unread = raw

    def read(self, size_bytes: int, path: str) -> memoryview:
        """Take the next bytes, for the input at `path` in the JSON. Raises InvalidInput."""
        if not 0 <= size_bytes <= len(self._unread):
            raise InvalidInput(
                f"{path}.parameters.binary_data_size is {size_bytes}, and {len(self._unread)} bytes follow"
            )
        data, self._unread = self._unread[:size_bytes], self._unread[size_bytes:]
        return data

    def check_consumed(self) -> None:
        if self._unread:
            raise InvalidInput(f"{len(self._unread)} bytes follow the last binary input")


def _get_json_length(encoded: EncodedRequest) -> int:
    """Return the length of the JSON that the body begins with: all of it, unless the header gives a length."""
    text = encoded.headers.get(JSON_LENGTH_HEADER, str(len(encoded.body)))
    length = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= length <= len(encoded.body):
        raise InvalidInput(f"{JSON_LENGTH_HEADER} must be the length of the JSON that the body begins with")
    return length


def _decode_input(item: Mapping[str, Any], path: str, binary_data: _BinaryData, model_name: str) -> Tensor:
    name, datatype = _get_text(item, "name", path), _get_text(item, "datatype", path)
    shape = item.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise InvalidInput(f"{path}.shape must be a list of whole numbers")
    data = item.get("data")
    size_bytes = _get_parameters(item, path).get("binary_data_size")
    if data is None and type(size_bytes) is int:
        return Tensor.from_raw(name, datatype, shape, binary_data.read(size_bytes, path))
    if data is None:
        raise InvalidInput(f"'data' field is missing for input '{name}' for model '{model_name}'")
    if not isinstance(data, list):
        raise InvalidInput(f"{path}.data must be a list")
    if datatype == "FP16":
        raise InvalidInput(FP16_IN_JSON.format(f"input {name}"))
    return Tensor.from_values(name, datatype, shape, _flatten_texts(data, path) if datatype == "BYTES" else data)


def _get_items(payload: Mapping[str, Any], key: str) -> list[tuple[Mapping[str, Any], str]]:
    """Return the objects of a list that may be missing, each with its path for error texts."""
    items = payload.get(key) or []
    if not isinstance(items, list):
        raise InvalidInput(f'"{key}" must be a list')
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise InvalidInput(f"{key}[{index}] must be an object")
    return [(item, f"{key}[{index}]") for index, item in enumerate(items)]


def _get_parameters(item: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidInput(f"parameters of {path} must be an object")
    return parameters


def _get_text(item: Mapping[str, Any], key: str, path: str) -> str:
    text = item.get(key)
    if not isinstance(text, str):
        raise InvalidInput(f"{path}.{key} must be a string")
    return text


def _flatten_texts(data: list[Any], path: str) -> list[bytes]:
    """Return the elements of a BYTES tensor in JSON: strings, flat or in lists nested as the shape says."""
    while data and all(isinstance(item, list) for item in data):
        data = [element for item in data for element in item]
    if not all(isinstance(item, str) for item in data):
        raise InvalidInput(f"{path}.data must be strings, as its datatype is BYTES")
    return [item.encode() for item in data]
