"""KServe's REST protocol V1: `instances` in, `predictions` out."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.errors import NotSupported
from pinnace.http.request import body_type, cancel_on_disconnect, read_inference
from pinnace.http.response import inference_response
from pinnace.http.v1_codec import PredictExchange
from pinnace.inference.dataplane import DataPlane


def routes(dataplane: DataPlane) -> list[Route]:
    async def predict(request: HttpRequest) -> HttpResponse:
        with dataplane.counted("v1"):
            name = request.path_params["model"]
            dataplane.check_open(name)
            kind = body_type(request.headers, images=True)
            body = await read_inference(request, dataplane.metrics, "v1")
            exchange = PredictExchange(name, dict(request.headers), kind, body, dataplane.settings)
            async with cancel_on_disconnect(request):
                (answer, headers), latency = await dataplane.infer(name, exchange.decode, exchange.encode)
            dataplane.metrics.sent("v1", len(answer))
            return inference_response(answer, headers, latency)

    async def explain(request: HttpRequest) -> HttpResponse:
        dataplane.repository.get_ready(request.path_params["model"])
        raise NotSupported("Could not find explainer_host.")  # KServe's words for a model without an explainer

    return [
        Route("/v1/models/{model}:predict", predict, methods=["POST"]),
        Route("/v1/models/{model}:explain", explain, methods=["POST"]),
    ]
