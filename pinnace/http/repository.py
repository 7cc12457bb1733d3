"""REST routes that list models, report their readiness, and load and unload them.

The repository routes are Triton's extension:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.errors import ModelNotReady
from pinnace.http.json import parse_json
from pinnace.http.request import read_body
from pinnace.http.response import json_response
from pinnace.inference.dataplane import DataPlane


def routes(dataplane: DataPlane) -> list[Route]:
    """Return the routes."""
    repository = dataplane.repository

    async def models(_: HttpRequest) -> HttpResponse:
        return json_response({"models": repository.names})

    async def ready(request: HttpRequest) -> HttpResponse:
        if not repository.is_ready(name := request.path_params["model"]):
            raise ModelNotReady(name)
        return json_response({"name": name, "ready": True})

    async def index(request: HttpRequest) -> HttpResponse:
        repository.check_mutable()
        body = await read_body(request)
        options = await asyncio.to_thread(parse_json, body) if body else {}
        only_ready = isinstance(options, dict) and options.get("ready") is True
        models = repository.index(only_ready)
        return json_response(
            [{"name": model.name, "version": "", "state": model.state, "reason": ""} for model in models]
        )

    async def load(request: HttpRequest) -> HttpResponse:
        await repository.load(name := request.path_params["model"])
        return json_response({"name": name, "load": True})

    async def unload(request: HttpRequest) -> HttpResponse:
        await repository.unload(name := request.path_params["model"])
        return json_response({"name": name, "unload": True})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{model}", ready),
        Route("/v2/models", models),
        Route("/v2/models/{model}/ready", ready),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", unload, methods=["POST"]),
    ]
