"""The route `/`: a page to try the model in a browser, and KServe's liveness answer for other clients."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pinnace.http.json import dump_json
from pinnace.http.response import json_response
from pinnace.inference.dataplane import DataPlane
from pinnace.settings import Settings

PAGE = Path(__file__).with_name("page.html")
SHOWN_SETTINGS = ("enable_grpc", "grpc_port", "max_body_bytes")
HEADERS = {
    # The page is one file. The policy makes the browser block everything else that injected content might load or call.
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "vary": "accept",
}


def routes(dataplane: DataPlane) -> list[Route]:
    """Return the route."""
    page = _page(dataplane.settings) if dataplane.settings.enable_ui else ""

    async def root(request: HttpRequest) -> HttpResponse:
        if page and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(page, headers=HEADERS)
        return json_response({"status": "alive"})

    return [Route("/", root)]


def _page(settings: Settings) -> str:
    shown = {name: getattr(settings, name) for name in SHOWN_SETTINGS}
    return PAGE.read_text().replace("SETTINGS", dump_json(shown).decode(), 1)
