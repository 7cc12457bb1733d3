"""KServe's REST protocol V1: `instances` in, `predictions` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from serving.dataplane import DataPlane
from serving.errors import InvalidInput, NotSupported
from serving.image import from_base64
from serving.predictor import Request, RequestedOutput, Response
from serving.tensors import Tensor, tensor_of_lists, tensor_of_values
from serving.transports.rest_json import body_type, json_response, parse_json

CLASSIFICATION = tuple(RequestedOutput(name) for name in ("labels", "indices", "probabilities", "output-0"))
CLASSIFICATION_KEYS = ("label", "index", "probability", "logit")
SIGNATURES = {"serving_default": (), "predict": (), "classification": CLASSIFICATION}


def routes(dataplane: DataPlane) -> list[Route]:
    async def models(_: HttpRequest) -> HttpResponse:
        return json_response({"models": dataplane.models.names})

    async def model(request: HttpRequest) -> HttpResponse:
        found = dataplane.models.get_ready(request.path_params["model"])
        return json_response({"name": found.name, "ready": True})

    async def predict(request: HttpRequest) -> HttpResponse:
        name = request.path_params["model"]
        dataplane.models.get_ready(name)
        decode = DECODERS[body_type(request.headers, images=True)]
        body = await request.body()
        exchange = _Exchange(partial(decode, name, dict(request.headers), body))
        return await dataplane.infer(exchange.decode, exchange.encode)

    async def explain(request: HttpRequest) -> HttpResponse:
        dataplane.models.get_ready(request.path_params["model"])
        raise NotSupported("Could not find explainer_host.")  # KServe's words for a model without an explainer

    return [
        Route("/v1/models", models),
        Route("/v1/models/{model}:predict", predict, methods=["POST"]),
        Route("/v1/models/{model}:explain", explain, methods=["POST"]),
        Route("/v1/models/{model}", model),
    ]


class _Exchange:
    """One prediction: the form of the answer follows from the request."""

    def __init__(self, decode: Callable[[], Request]) -> None:
        self._decode = decode
        self._classification = False

    def decode(self) -> Request:
        request = self._decode()
        self._classification = request.outputs == CLASSIFICATION
        return request

    def encode(self, response: Response) -> HttpResponse:
        rows = _classes(response) if self._classification else _rows(response)
        return json_response({"predictions": rows}, headers=response.headers)


def decode_image(model_name: str, headers: Mapping[str, str], body: bytes) -> Request:
    """A body that is one encoded image."""
    image = tensor_of_values("image", "BYTES", [1], [body])
    return Request(model_name, (image,), instances=1, headers=headers)


def decode_instances(model_name: str, headers: Mapping[str, str], body: bytes) -> Request:
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
    signature = payload.get("signature_name", "serving_default")
    if not isinstance(signature, str) or signature not in SIGNATURES:
        raise InvalidInput(f'"signature_name" must be one of {", ".join(SIGNATURES)}')
    return Request(
        model_name,
        tuple(_inputs(instances)),
        outputs=SIGNATURES[signature],
        instances=len(instances),
        headers=headers,
    )


DECODERS = {"json": decode_instances, "image": decode_image}


def _rows(response: Response) -> list[Any]:
    """A row an instance: the row itself where the model has one output, else an object of its outputs."""
    columns = [tensor.array.tolist() for tensor in response.outputs]
    names = [tensor.name for tensor in response.outputs]
    if len(columns) == 1:
        rows: list[Any] = columns[0]
        return rows
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _classes(response: Response) -> list[Any]:
    """A list an instance of the classes found, as TF Serving's classification gives them."""
    columns = [tensor.array.tolist() for tensor in response.outputs]
    return [
        [dict(zip(CLASSIFICATION_KEYS, found, strict=True)) for found in zip(*row, strict=True)]
        for row in zip(*columns, strict=True)
    ]


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
