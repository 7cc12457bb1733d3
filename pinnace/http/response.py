"""HTTP responses: JSON, and errors with the headers that belong to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from pinnace.errors import ServingError
from pinnace.http.json import dump_json


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with `content` as JSON."""
    return Response(dump_json(content), status, headers, media_type="application/json")


def error_response(error: ServingError) -> Response:
    """Return the response that an error declares: its status, its text and, if a retry may succeed, Retry-After."""
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after_seconds)))} if error.retry else {}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return json_response({"error": str(error)}, error.http_status, headers)
