"""Who may ask what over REST: probes are everybody's."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from pinnace.auth import Authenticator
from pinnace.errors import Unauthenticated
from pinnace.http.hypercorn_patches import has_certificate
from pinnace.http.response import error_response

PROBES = re.compile("/|/v2/health/(live|ready)|/v1/models/[^/:]+|/v2/models/[^/]+/ready")


class AuthMiddleware:
    """Pure ASGI middleware."""

    def __init__(self, app: ASGIApp, credentials: Authenticator) -> None:
        self._app = app
        self._credentials = credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and not (scope["method"] in ("GET", "HEAD") and PROBES.fullmatch(scope["path"])):
            header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            try:
                self._credentials.check(header.decode("latin-1"), has_certificate(scope))
            except Unauthenticated as error:
                app = error_response(error)
        await app(scope, receive, send)
