"""The Open Inference Protocol over REST, also called V2."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from serving import NAME, __version__
from serving.dataplane import DataPlane
from serving.errors import NotSupported
from serving.tensors import TensorSpec
from serving.transports.rest_json import body_type, json_response, read_body
from serving.transports.rest_v2_codec import LENGTH_HEADER, InferExchange

EXTENSIONS = ("binary_tensor_data", "classification")


def routes(dataplane: DataPlane) -> list[Route]:
    async def server(_: HttpRequest) -> HttpResponse:
        return json_response({"name": NAME, "version": __version__, "extensions": EXTENSIONS})

    async def models(_: HttpRequest) -> HttpResponse:
        return json_response({"models": dataplane.models.names})

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

    async def ready(request: HttpRequest) -> HttpResponse:
        model = dataplane.models.get_ready(request.path_params["model"])
        return json_response({"name": model.name, "ready": True})

    async def infer(request: HttpRequest) -> HttpResponse:
        with dataplane.counted("v2"):
            name = request.path_params["model"]
            dataplane.models.get_ready(name)
            if LENGTH_HEADER not in request.headers:
                body_type(request.headers)  # JSON, or refused; with that header it is what the header says
            body = await read_body(request, dataplane.metrics, "v2")
            exchange = InferExchange(name, dict(request.headers), body)
            answer, headers = await dataplane.infer(exchange.decode, exchange.encode)
            dataplane.metrics.sent("v2", len(answer))
            return HttpResponse(answer, headers=headers)

    async def version(_: HttpRequest) -> HttpResponse:
        raise NotSupported("Model versioning not supported yet.")

    return [
        Route("/v2", server),
        Route("/v2/models", models),
        Route("/v2/models/{model}", metadata),
        Route("/v2/models/{model}/ready", ready),
        Route("/v2/models/{model}/infer", infer, methods=["POST"]),
        Route("/v2/models/{model}/versions/{version}", version),
        Route("/v2/models/{model}/versions/{version}/ready", version),
        Route("/v2/models/{model}/versions/{version}/infer", version, methods=["POST"]),
    ]


def _specification(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}
