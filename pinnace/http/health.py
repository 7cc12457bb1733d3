"""REST routes of the liveness and readiness probes and of the Prometheus metrics."""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.http.response import json_response
from pinnace.inference.dataplane import DataPlane


def routes(dataplane: DataPlane) -> list[Route]:
    """Return the routes."""
    rendering = asyncio.Lock()

    async def live(_: HttpRequest) -> HttpResponse:
        return json_response({"live": True})

    async def ready(_: HttpRequest) -> HttpResponse:
        is_ready = dataplane.repository.is_ready()
        return json_response({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(request: HttpRequest) -> HttpResponse:
        accept = request.headers.get("accept", "")
        # One at a time: six threads that render take turns of 5 ms, and the event loop waits for all of them.
        async with rendering:
            text, content_type = await asyncio.to_thread(dataplane.metrics.render, accept)
        return HttpResponse(text, headers={"content-type": content_type})

    return [
        Route("/metrics", metrics),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
    ]
