"""The Open Inference Protocol over REST, also called V2."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from serving.dataplane import DataPlane
from serving.tensors import TensorSpec
from serving.transports.rest_json import json_response


def routes(dataplane: DataPlane) -> list[Route]:
    async def metadata(request: HttpRequest) -> HttpResponse:
        model = dataplane.models.get(request.path_params["model"])
        content: dict[str, Any] = {
            "name": model.name,
            "versions": None,
            "platform": model.predictor.platform,
            "inputs": [_specification(spec) for spec in model.predictor.inputs],
            "outputs": [_specification(spec) for spec in model.predictor.outputs],
        }
        if model.predictor.warning:
            content["warning"] = model.predictor.warning
        return json_response(content)

    return [Route("/v2/models/{model}", metadata)]


def _specification(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}
