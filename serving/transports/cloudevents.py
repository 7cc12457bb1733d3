"""CloudEvents around V1 requests and their answers, as KServe's eventing sends them: structured, or in headers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from serving.errors import InvalidInput
from serving.predictor import Response
from serving.transports.rest_json import media_type

STRUCTURED_TYPE = "application/cloudevents+json"
REQUIRED = ("specversion", "id", "source", "type")
SPEC_VERSIONS = ("1.0", "0.3")


def data_of(payload: Any, headers: Mapping[str, str]) -> Any:
    """What a structured event carries, by its type or by its looks; any other payload as it is. Raises InvalidInput."""
    looks_so = isinstance(payload, dict) and all(name in payload for name in (*REQUIRED, "time", "data"))
    if not (looks_so or _is_structured(headers)):
        return payload
    for name in (*REQUIRED, "data"):
        if not isinstance(payload, dict) or name not in payload:
            raise InvalidInput(f'not a CloudEvent: "{name}" is missing')
    if payload["specversion"] not in SPEC_VERSIONS:
        raise InvalidInput(f'not a CloudEvent: "specversion" must be one of {", ".join(SPEC_VERSIONS)}')
    return payload["data"]


def answer(content: Any, response: Response, headers: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """The content in an event of its own where the request was one, and the headers that say so."""
    structured, binary = _is_structured(headers), all(f"ce-{name}" in headers for name in REQUIRED)
    if not (structured or binary):
        return content, {"content-type": "application/json"}
    attributes = {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": f"io.kserve.inference.{response.model_name}",
        "type": "io.kserve.inference.response",
        "time": datetime.now(UTC).isoformat(),
    }
    if structured:
        return {**attributes, "data": content}, {"content-type": STRUCTURED_TYPE}
    described = {f"ce-{name}": value for name, value in attributes.items()}
    return content, {"content-type": "application/json", **described}


def _is_structured(headers: Mapping[str, str]) -> bool:
    return media_type(headers) == STRUCTURED_TYPE
