"""Routes of the API's description: an OpenAPI document, and Swagger UI, which works offline."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

import pybase64
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, HTMLResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.http.json import dump_json
from pinnace.http.v1 import V1Codec
from pinnace.inference.codec import EncodedRequest
from pinnace.inference.dataplane import DataPlane
from pinnace.inference.model import Model
from pinnace.settings import Settings
from pinnace.tensors import Tensor
from pinnace.version import __version__

DOCUMENT = Path(__file__).with_name("openapi.yaml")
ASSETS = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")

# URLs are relative, so that a proxy can serve the page below another path.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pinnace</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#docs", validatorUrl: null})</script>
</body>
</html>
"""


def routes(dataplane: DataPlane) -> list[Route]:
    """Return the routes; those of Swagger UI only with --enable_docs_url."""

    @cache
    def document() -> bytes:
        return dump_json(_document(list(dataplane.repository), dataplane.settings))

    async def openapi(_: HttpRequest) -> HttpResponse:
        return HttpResponse(await asyncio.to_thread(document), media_type="application/json")

    async def page(_: HttpRequest) -> HttpResponse:
        return HTMLResponse(PAGE)

    openapi_route = Route("/openapi.json", openapi)
    if not dataplane.settings.enable_docs_url:
        return [openapi_route]
    return [openapi_route, Route("/docs", page), *_assets()]


def _assets() -> list[Route]:
    from swagger_ui_bundle import swagger_ui_path  # only Swagger UI needs it

    def asset(name: str) -> Route:
        async def send(_: HttpRequest) -> HttpResponse:
            return FileResponse(swagger_ui_path / name)

        return Route(f"/docs/{name}", send)

    return [asset(name) for name in ASSETS]


def _document(models: list[Model], settings: Settings) -> Any:
    """Return the OpenAPI document with Pinnace's version, the models' names and the first model's example."""
    import yaml  # loading it and reading the file takes 0.1 s, and few clients need the document

    document = yaml.safe_load(DOCUMENT.read_text())
    document["info"]["version"] = __version__
    document["components"]["parameters"]["Model"]["schema"]["enum"] = [model.name for model in models]
    instances = list(models[0].metadata.example)
    if instances:
        encoded = EncodedRequest(models[0].name, dump_json({"instances": instances}))
        tensors = V1Codec(settings).decode(encoded).inputs
        schemas = document["components"]["schemas"]
        schemas["Instances"]["example"] = {"instances": instances}
        schemas["InferenceRequest"]["example"] = {"inputs": [_input(tensor) for tensor in tensors]}
    return document


def _input(tensor: Tensor) -> dict[str, Any]:
    data = tensor.array.reshape(-1).tolist()
    if tensor.datatype == "BYTES":
        data = [pybase64.b64encode(element).decode() for element in data]
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, "data": data}
