"""The Open Inference Protocol over REST, also called V2."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.errors import NotSupported
from pinnace.http.request import body_type, cancel_on_disconnect, read_inference
from pinnace.http.response import inference_response, json_response
from pinnace.http.v2_codec import LENGTH_HEADER, InferExchange
from pinnace.inference.dataplane import DataPlane
from pinnace.version import NAME, __version__


def routes(dataplane: DataPlane) -> list[Route]:
    async def server(_: HttpRequest) -> HttpResponse:
        return json_response(
            {"name": NAME, "version": __version__, "extensions": ["binary_tensor_data", *dataplane.extensions]}
        )

    async def metadata(request: HttpRequest) -> HttpResponse:
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

    async def infer(request: HttpRequest) -> HttpResponse:
        with dataplane.counted("v2"):
            name = request.path_params["model"]
            dataplane.check_open(name)
            if LENGTH_HEADER not in request.headers:
                body_type(request.headers)  # JSON, or refused; with that header it is what the header says
            body = await read_inference(request, dataplane.metrics, "v2")
            exchange = InferExchange(name, dict(request.headers), body)
            async with cancel_on_disconnect(request):
                (answer, headers), latency = await dataplane.infer(name, exchange.decode, exchange.encode)
            dataplane.metrics.sent("v2", len(answer))
            return inference_response(answer, headers, latency)

    async def version(_: HttpRequest) -> HttpResponse:
        raise NotSupported("Model versioning not supported yet.")

    return [
        Route("/v2", server),
        Route("/v2/models/{model}", metadata),
        Route("/v2/models/{model}/infer", infer, methods=["POST"]),
        Route("/v2/models/{model}/versions/{version}", version),
        Route("/v2/models/{model}/versions/{version}/ready", version),
        Route("/v2/models/{model}/versions/{version}/infer", version, methods=["POST"]),
    ]
