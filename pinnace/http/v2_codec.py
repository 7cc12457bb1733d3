"""Bodies of V2 inference: JSON, with tensors in it as numbers or, by the binary extension, behind it as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pinnace.errors import InvalidInput
from pinnace.http.json import dump_json, parse_json
from pinnace.predictor import Request, RequestedOutput, Response
from pinnace.tensors import Tensor, raw_of_tensor, tensor_of_raw, tensor_of_values

LENGTH_HEADER = "inference-header-content-length"


class InferExchange:
    """One inference; which outputs travel as bytes follows from the request."""

    def __init__(self, model_name: str, headers: Mapping[str, str], body: bytes) -> None:
        self._model_name = model_name
        self._headers = headers
        self._body = body
        self._all_binary = False
        self._binary: dict[str, bool] = {}

    def decode(self) -> Request:
        """Raises InvalidInput and TooLarge."""
        length = _json_length(self._headers, self._body)
        payload = parse_json(self._body[:length])
        if not isinstance(payload, dict):
            raise InvalidInput('the body must be a JSON object with "inputs"')
        tail = _Tail(memoryview(self._body)[length:])
        inputs = [self._input(entry, path, tail) for entry, path in _entries(payload, "inputs")]
        if not inputs:
            raise InvalidInput('"inputs" is missing or empty')
        tail.finish()
        self._all_binary = _parameters(payload, "the request").get("binary_data_output") is True
        outputs = [_requested(entry, path) for entry, path in _entries(payload, "outputs")]
        for output in outputs:
            self._binary[output.name] = output.parameters.get("binary_data", self._all_binary) is True
        identifier = payload.get("id") or ""
        if not isinstance(identifier, str):
            raise InvalidInput('"id" must be a string')
        return Request(self._model_name, tuple(inputs), identifier, tuple(outputs), headers=self._headers)

    def encode(self, response: Response) -> tuple[bytes, dict[str, str]]:
        """The body, and the headers of the response. Raises InvalidInput for FP16 in JSON."""
        outputs, tail = [], []
        for tensor in response.outputs:
            output: dict[str, Any] = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype}
            if self._binary.get(tensor.name, self._all_binary):
                tail.append(raw_of_tensor(tensor))
                output["parameters"] = {"binary_data_size": len(tail[-1])}
            elif tensor.datatype == "FP16":
                raise InvalidInput(NO_FP16.format(f"output {tensor.name}"))
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
        header = dump_json(content)
        if not tail:
            return header, {**response.headers, "content-type": "application/json"}
        binary = {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(header))}
        return b"".join([header, *tail]), {**response.headers, **binary}

    def _input(self, entry: Mapping[str, Any], path: str, tail: _Tail) -> Tensor:
        name, datatype = _text(entry, "name", path), _text(entry, "datatype", path)
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise InvalidInput(f"{path}.shape must be a list of whole numbers")
        data = entry.get("data")
        size = _parameters(entry, path).get("binary_data_size")
        if data is None and type(size) is int:
            return tensor_of_raw(name, datatype, shape, tail.take(size, path))
        if data is None:
            raise InvalidInput(f"'data' field is missing for input '{name}' for model '{self._model_name}'")
        if not isinstance(data, list):
            raise InvalidInput(f"{path}.data must be a list")
        if datatype == "FP16":
            raise InvalidInput(NO_FP16.format(f"input {name}"))
        return tensor_of_values(name, datatype, shape, _strings(data, path) if datatype == "BYTES" else data)


NO_FP16 = "Sending FP16 data via JSON is not supported. Please use the binary data format for {}"


class _Tail:
    """The bytes behind the JSON, handed out from the front."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw

    def take(self, size: int, path: str) -> memoryview:
        if not 0 <= size <= len(self._raw):
            raise InvalidInput(f"{path}.parameters.binary_data_size is {size}, and {len(self._raw)} bytes follow")
        taken, self._raw = self._raw[:size], self._raw[size:]
        return taken

    def finish(self) -> None:
        if self._raw:
            raise InvalidInput(f"{len(self._raw)} bytes follow the last binary input")


def _json_length(headers: Mapping[str, str], body: bytes) -> int:
    """Of the JSON that the body begins with; without the header it is all of it."""
    text = headers.get(LENGTH_HEADER, str(len(body)))
    length = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= length <= len(body):
        raise InvalidInput(f"{LENGTH_HEADER} must be the length of the JSON that the body begins with")
    return length


def _entries(payload: Mapping[str, Any], key: str) -> list[tuple[Mapping[str, Any], str]]:
    """The objects of a list that may be missing, each with its path for error texts."""
    entries = payload.get(key) or []
    if not isinstance(entries, list):
        raise InvalidInput(f'"{key}" must be a list')
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InvalidInput(f"{key}[{row}] must be an object")
    return [(entry, f"{key}[{row}]") for row, entry in enumerate(entries)]


def _requested(entry: Mapping[str, Any], path: str) -> RequestedOutput:
    return RequestedOutput(_text(entry, "name", path), _parameters(entry, path))


def _parameters(entry: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidInput(f"parameters of {path} must be an object")
    return parameters


def _text(entry: Mapping[str, Any], key: str, path: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str):
        raise InvalidInput(f"{path}.{key} must be a string")
    return text


def _strings(data: list[Any], path: str) -> list[bytes]:
    """BYTES in JSON: text, flat or in lists as deep as the shape."""
    while data and all(isinstance(item, list) for item in data):
        data = [inner for item in data for inner in item]
    if not all(isinstance(item, str) for item in data):
        raise InvalidInput(f"{path}.data must be strings, as its datatype is BYTES")
    return [item.encode() for item in data]
