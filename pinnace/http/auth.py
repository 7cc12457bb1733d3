"""Authentication of REST requests. Probes are public."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from pinnace.auth import Authenticator
from pinnace.errors import Unauthenticated
from pinnace.http.hypercorn_patches import has_certificate
from pinnace.http.response import error_response

PUBLIC_PATHS = re.compile("/|/v2/health/(live|ready)|/v1/models/[^/:]+|/v2/models/[^/]+/ready")


class AuthMiddleware:
    """ASGI middleware that answers 401 to requests the Authenticator rejects."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        is_public = scope["type"] != "http" or (
            scope["method"] in ("GET", "HEAD") and PUBLIC_PATHS.fullmatch(scope["path"])
        )
        if not is_public:
            header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            try:
                self._authenticator.check(header.decode("latin-1"), has_certificate(scope))
            except Unauthenticated as error:
                app = error_response(error)
        await app(scope, receive, send)
