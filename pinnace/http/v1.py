"""KServe's REST protocol V1: `instances` in, `predictions` out.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.base64_text import from_base64
from pinnace.errors import InvalidInput, NotSupported
from pinnace.http import cloudevents
from pinnace.http.inference import infer
from pinnace.http.json import dump_json, parse_json
from pinnace.http.request import IMAGE_TYPES, check_content_type, media_type
from pinnace.inference.admission import check_max_rows
from pinnace.inference.codec import EncodedRequest, EncodedResponse
from pinnace.inference.dataplane import DataPlane
from pinnace.predictor import Request, RequestedOutput, Response
from pinnace.settings import Settings
from pinnace.tensors import Tensor

CLASSIFICATION = tuple(RequestedOutput(name) for name in ("labels", "indices", "probabilities", "output-0"))
CLASSIFICATION_KEYS = ("label", "index", "probability", "logit")
SIGNATURES = {"serving_default": (), "predict": (), "classification": CLASSIFICATION}
DEFAULT_SIGNATURE = "serving_default"


def routes(dataplane: DataPlane) -> list[Route]:
    """Return the routes of V1 inference."""

    async def explain(request: HttpRequest) -> HttpResponse:
        dataplane.repository.get_ready(request.path_params["model"])
        raise NotSupported("Could not find explainer_host.")  # KServe's text for a model without an explainer

    return [
        Route("/v1/models/{model}:predict", partial(infer, dataplane, V1Codec(dataplane.settings)), methods=["POST"]),
        Route("/v1/models/{model}:explain", explain, methods=["POST"]),
    ]


@dataclass(frozen=True, slots=True)
class _ResponseFormat:
    """How a response is encoded: as TF Serving's classification or not, and in a CloudEvent if the request was one."""

    is_classification: bool
    envelope: cloudevents.Envelope | None


class V1Codec:
    """Translates V1 bodies. A body is JSON or one encoded image, and may come in a CloudEvent."""

    protocol: ClassVar[str] = "v1"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Raise UnsupportedMediaType unless the body is JSON or an image."""
        check_content_type(headers, allow_images=True)

    def decode(self, encoded: EncodedRequest) -> Request:
        """Decode the instances of a request. Raises InvalidInput and TooLarge."""
        content_type = media_type(encoded.headers)
        has_image = content_type.startswith(IMAGE_TYPES)
        payload = None if has_image else parse_json(encoded.body)
        payload, envelope = cloudevents.unwrap(payload, content_type, encoded.headers)
        if has_image:
            return Request(
                encoded.model_name,
                (Tensor.from_values("image", "BYTES", [1], [encoded.body]),),
                num_instances=1,
                headers=encoded.headers,
                response_format=_ResponseFormat(False, envelope),
            )
        instances = _get_instances(payload)
        check_max_rows(len(instances), self._settings)  # before they cost the time to be made into tensors
        signature = payload.get("signature_name", DEFAULT_SIGNATURE)
        if not isinstance(signature, str) or signature not in SIGNATURES:
            raise InvalidInput(f'"signature_name" must be one of {", ".join(SIGNATURES)}')
        return Request(
            encoded.model_name,
            tuple(_to_tensors(instances)),
            outputs=SIGNATURES[signature],
            num_instances=len(instances),
            headers=encoded.headers,
            response_format=_ResponseFormat(signature == "classification", envelope),
        )

    def encode(self, response: Response, request: Request) -> EncodedResponse:
        """Encode the predictions, one per instance."""
        form: _ResponseFormat = request.response_format
        predictions = _to_classes(response) if form.is_classification else _to_rows(response)
        content, headers = {"predictions": predictions}, {"content-type": "application/json"}
        if form.envelope:
            content, headers = form.envelope.wrap(content, response.model_name, self._settings)
        return EncodedResponse(dump_json(content), {**response.headers, **headers})


def _get_instances(payload: Any) -> list[Any]:
    if not isinstance(payload, dict):
        raise InvalidInput('the body must be a JSON object with "instances"')
    instances = payload.get("instances", payload.get("inputs"))
    if instances is None:
        raise InvalidInput('"instances" is missing')
    if not isinstance(instances, list):
        raise InvalidInput('Expected "instances" to be a list')
    if not instances:
        raise InvalidInput('"instances" is empty')
    return instances


def _to_rows(response: Response) -> list[Any]:
    """Return one item per instance: the row itself if the model has one output, else an object with its outputs."""
    columns = [tensor.array.tolist() for tensor in response.outputs]
    names = [tensor.name for tensor in response.outputs]
    if len(columns) == 1:
        rows: list[Any] = columns[0]
        return rows
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _to_classes(response: Response) -> list[Any]:
    """Return one list of classes per instance, in the form of TF Serving's classification API."""
    columns = [tensor.array.tolist() for tensor in response.outputs]
    return [
        [dict(zip(CLASSIFICATION_KEYS, values, strict=True)) for values in zip(*row, strict=True)]
        for row in zip(*columns, strict=True)
    ]


def _to_tensors(instances: list[Any]) -> list[Tensor]:
    """Convert instances in TF Serving's row format, which V1 has inherited, to tensors.

    Instances are values, or objects that all have the same keys. Each key becomes one tensor with a row per instance.
    Strings and `{"b64": …}` become BYTES. https://www.tensorflow.org/tfx/serving/api_rest#encoding_binary_values
    """
    first = instances[0]
    if not isinstance(first, dict) or "b64" in first:
        values = [_to_value(instance, f"instances[{row}]") for row, instance in enumerate(instances)]
        return [Tensor.from_lists("instances", values)]
    columns: dict[str, list[Any]] = {key: [] for key in first}
    if not columns:
        raise InvalidInput("instances[0] is empty")
    for row, instance in enumerate(instances):
        if not isinstance(instance, dict) or instance.keys() != columns.keys():
            raise InvalidInput(f"instances[{row}] must be an object with the same keys as instances[0]")
        for key, value in instance.items():
            columns[key].append(_to_value(value, f"instances[{row}].{key}"))
    return [Tensor.from_lists(key, values) for key, values in columns.items()]


def _to_value(value: Any, path: str) -> Any:
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
