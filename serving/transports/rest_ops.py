"""What operators and platforms ask: is the server alive, is it ready."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from serving.dataplane import DataPlane
from serving.transports.rest_json import json_response


def routes(dataplane: DataPlane) -> list[Route]:
    async def alive(_: HttpRequest) -> HttpResponse:
        return json_response({"status": "alive"})

    async def live(_: HttpRequest) -> HttpResponse:
        return json_response({"live": True})

    async def ready(_: HttpRequest) -> HttpResponse:
        return json_response({"ready": dataplane.ready}, 200 if dataplane.ready else 503)

    return [Route("/", alive), Route("/v2/health/live", live), Route("/v2/health/ready", ready)]
