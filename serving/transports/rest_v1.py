"""KServe's REST protocol V1: `instances` in, `predictions` out."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from serving.dataplane import DataPlane
from serving.errors import NotSupported
from serving.transports.rest_json import body_type, json_response
from serving.transports.rest_v1_codec import PredictExchange


def routes(dataplane: DataPlane) -> list[Route]:
    async def models(_: HttpRequest) -> HttpResponse:
        return json_response({"models": dataplane.models.names})

    async def model(request: HttpRequest) -> HttpResponse:
        found = dataplane.models.get_ready(request.path_params["model"])
        return json_response({"name": found.name, "ready": True})

    async def predict(request: HttpRequest) -> HttpResponse:
        name = request.path_params["model"]
        dataplane.models.get_ready(name)
        kind = body_type(request.headers, images=True)
        exchange = PredictExchange(name, dict(request.headers), kind, await request.body())
        body, headers = await dataplane.infer(exchange.decode, exchange.encode)
        return HttpResponse(body, headers=headers)

    async def explain(request: HttpRequest) -> HttpResponse:
        dataplane.models.get_ready(request.path_params["model"])
        raise NotSupported("Could not find explainer_host.")  # KServe's words for a model without an explainer

    return [
        Route("/v1/models", models),
        Route("/v1/models/{model}:predict", predict, methods=["POST"]),
        Route("/v1/models/{model}:explain", explain, methods=["POST"]),
        Route("/v1/models/{model}", model),
    ]
