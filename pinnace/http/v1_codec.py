"""Bodies of V1 prediction: `instances` in, `predictions` out, in CloudEvents where they come so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pinnace.base64_text import from_base64
from pinnace.errors import InvalidInput
from pinnace.http import cloudevents
from pinnace.http.json import dump_json, parse_json
from pinnace.inference.admission import check_instances
from pinnace.predictor import Request, RequestedOutput, Response
from pinnace.settings import Settings
from pinnace.tensors import Tensor, tensor_of_lists, tensor_of_values

CLASSIFICATION = tuple(RequestedOutput(name) for name in ("labels", "indices", "probabilities", "output-0"))
CLASSIFICATION_KEYS = ("label", "index", "probability", "logit")
SIGNATURES = {"serving_default": (), "predict": (), "classification": CLASSIFICATION}


class PredictExchange:
    """One prediction; the form of the answer follows from the request."""

    def __init__(self, model_name: str, headers: Mapping[str, str], kind: str, body: bytes, settings: Settings) -> None:
        """`kind` is that of rest_request.body_type: json, or image for one encoded picture."""
        self._model_name = model_name
        self._headers = headers
        self._kind = kind
        self._body = body
        self._settings = settings
        self._envelope = cloudevents.Envelope()
        self._classification = False

    def decode(self) -> Request:
        """Raises InvalidInput and TooLarge."""
        payload = None if self._kind == "image" else parse_json(self._body)
        payload, self._envelope = cloudevents.opened(payload, self._headers)
        if self._kind == "image":
            image = tensor_of_values("image", "BYTES", [1], [self._body])
            return Request(self._model_name, (image,), instances=1, headers=self._headers)
        if not isinstance(payload, dict):
            raise InvalidInput('the body must be a JSON object with "instances"')
        instances = payload.get("instances", payload.get("inputs"))
        if instances is None:
            raise InvalidInput('"instances" is missing')
        if not isinstance(instances, list):
            raise InvalidInput('Expected "instances" to be a list')
        if not instances:
            raise InvalidInput('"instances" is empty')
        check_instances(len(instances), self._settings)  # before they are made into tensors
        signature = payload.get("signature_name", "serving_default")
        if not isinstance(signature, str) or signature not in SIGNATURES:
            raise InvalidInput(f'"signature_name" must be one of {", ".join(SIGNATURES)}')
        self._classification = signature == "classification"
        return Request(
            self._model_name,
            tuple(_inputs(instances)),
            outputs=SIGNATURES[signature],
            instances=len(instances),
            headers=self._headers,
        )

    def encode(self, response: Response) -> tuple[bytes, dict[str, str]]:
        """The body, and the headers of the response."""
        content = {"predictions": _classes(response) if self._classification else _rows(response)}
        content, headers = self._envelope.around(content, response.model_name, self._settings)
        return dump_json(content), {**response.headers, **headers}


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
    """TF Serving's row format, from which V1 comes: instances are values, or objects that all have the same keys.

    Each key becomes one input with a row an instance; `{"b64": …}` and strings become BYTES.
    """
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
