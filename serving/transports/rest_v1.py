"""KServe's REST protocol V1: `instances` in, `predictions` out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from serving.dataplane import DataPlane
from serving.errors import InvalidInput, UnsupportedMediaType
from serving.image import from_base64
from serving.predictor import Request, Response
from serving.tensors import Tensor, tensor_of_lists, tensor_of_values
from serving.transports.rest_json import body_response, json_response, parse_json

# The form type is what `curl -d` sends, none at all what KServe's batcher sends: both mean JSON.
JSON_TYPES = {
    "",
    "application/json",
    "application/ld+json",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "text/plain",
}


def routes(dataplane: DataPlane) -> list[Route]:
    async def models(_: HttpRequest) -> HttpResponse:
        return json_response({"models": dataplane.models.names})

    async def model(request: HttpRequest) -> HttpResponse:
        found = dataplane.models.get_ready(request.path_params["model"])
        return json_response({"name": found.name, "ready": True})

    async def predict(request: HttpRequest) -> HttpResponse:
        name = request.path_params["model"]
        dataplane.models.get_ready(name)
        decode = _decoder(request)
        body = await request.body()
        return body_response(await dataplane.infer(partial(decode, name, body), encode_predictions))

    return [
        Route("/v1/models", models),
        Route("/v1/models/{model}:predict", predict, methods=["POST"]),
        Route("/v1/models/{model}", model),
    ]


def _decoder(request: HttpRequest) -> Callable[[str, bytes], Request]:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed: send it without Content-Encoding")
    if content_type.startswith("image/"):
        return decode_image
    if content_type in JSON_TYPES:
        return decode_instances
    raise UnsupportedMediaType("the body must be application/json, or an image as image/*: see Content-Type")


def decode_image(model_name: str, body: bytes) -> Request:
    """A body that is one encoded image."""
    return Request(model_name, (tensor_of_values("image", "BYTES", [1], [body]),))


def decode_instances(model_name: str, body: bytes) -> Request:
    """TF Serving's row format, from which V1 comes: instances are values, or objects that all have the same keys.

    Each key becomes one input with a row an instance; `{"b64": …}` and strings become BYTES. Raises InvalidInput.
    """
    payload = parse_json(body)
    if not isinstance(payload, dict):
        raise InvalidInput('the body must be a JSON object with "instances"')
    instances = payload.get("instances", payload.get("inputs"))
    if instances is None:
        raise InvalidInput('"instances" is missing')
    if not isinstance(instances, list):
        raise InvalidInput('Expected "instances" to be a list')
    if not instances:
        raise InvalidInput('"instances" is empty')
    return Request(model_name, tuple(_inputs(instances)))


def encode_predictions(response: Response) -> bytes:
    """A row an instance: the row itself where the model has one output, else an object of its outputs."""
    columns = [tensor.array.tolist() for tensor in response.outputs]
    names = [tensor.name for tensor in response.outputs]
    rows = (
        columns[0] if len(columns) == 1 else [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    )
    return orjson.dumps({"predictions": rows}, default=_text)


def _inputs(instances: list[Any]) -> list[Tensor]:
    first = instances[0]
    if not isinstance(first, dict) or "b64" in first:
        values = [_value(instance, f"instances[{row}]") for row, instance in enumerate(instances)]
        return [tensor_of_lists("instances", values)]
    columns: dict[str, list[Any]] = {key: [] for key in first}
    if not columns:
        raise InvalidInput("instances[0] is empty")
    for row, instance in enumerate(instances):
        if not isinstance(instance, dict) or instance.keys() != columns.keys():
            raise InvalidInput(f"instances[{row}] must be an object with the same keys as instances[0]")
        for key, value in instance.items():
            columns[key].append(_value(value, f"instances[{row}].{key}"))
    return [tensor_of_lists(key, values) for key, values in columns.items()]


def _value(value: Any, path: str) -> Any:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, dict):
        return value
    encoded = value.get("b64")
    if not isinstance(encoded, str):
        raise InvalidInput(f'{path} must be a value, or an object with base64 text as "b64"')
    try:
        return from_base64(encoded)
    except InvalidInput as error:
        raise InvalidInput(f"{path}.b64: {error}") from None


def _text(element: Any) -> str:
    """Elements of BYTES outputs are text, such as labels."""
    return bytes(element).decode(errors="replace")
