"""JSON bodies, in and out."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from serving.errors import InvalidInput, ServingError

RETRY_AFTER_SECONDS = 1


def parse_json(body: bytes) -> Any:
    """Raises InvalidInput."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"Unrecognized request format: {error}") from None


def json_response(content: Any, status: int = 200) -> Response:
    return body_response(orjson.dumps(content), status)


def body_response(body: bytes, status: int = 200) -> Response:
    """A body that is JSON already."""
    return Response(body, status, media_type="application/json")


def error_response(error: ServingError) -> Response:
    response = json_response({"error": str(error)}, error.http_status)
    if error.retry:
        response.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return response
