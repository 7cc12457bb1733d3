"""CloudEvents: V1 requests and responses wrapped in events, in structured or binary content mode, as in KServe.

Specification: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pinnace.errors import InvalidInput
from pinnace.settings import Settings

STRUCTURED_TYPE = "application/cloudevents+json"
REQUIRED = ("specversion", "id", "source", "type")
SPEC_VERSIONS = ("1.0", "0.3")
PREFIX = "ce-"
# Attributes that a response does not take over from its request even with --ce_merge.
NOT_MERGED = ("data", "datacontenttype", "id", "time")


@dataclass(frozen=True, slots=True)
class Envelope:
    """The event that a request was wrapped in. It decides how the response is wrapped.

    `form` is the content mode, "structured" or "binary" (attributes in headers). `attributes` are those of the
    request's event, extensions included.
    """

    form: str
    attributes: Mapping[str, Any]

    def wrap(self, content: Any, model_name: str, settings: Settings) -> tuple[Any, dict[str, str]]:
        """Return the content and its headers, as an event like the request's."""
        merged = self.attributes if settings.ce_merge else {}
        attributes = {
            **{name: value for name, value in merged.items() if name not in NOT_MERGED},
            "specversion": "1.0",
            "id": str(uuid.uuid4()),
            "source": settings.ce_source or f"io.kserve.inference.{model_name}",
            "type": settings.ce_type,
            "time": datetime.now(UTC).isoformat(),
        }
        if self.form == "structured":
            return {**attributes, "data": content}, {"content-type": STRUCTURED_TYPE}
        metadata = {f"{PREFIX}{name}": str(value) for name, value in attributes.items()}
        return content, {"content-type": "application/json", **metadata}


def unwrap(payload: Any, content_type: str, headers: Mapping[str, str]) -> tuple[Any, Envelope | None]:
    """Return the data of a structured event, or the payload itself, and the envelope for the response, if any.

    A payload with all attributes of an event is taken for a structured one even if its content type says otherwise; its
    response is not wrapped. Raises InvalidInput.
    """
    structured = content_type == STRUCTURED_TYPE
    if structured or (isinstance(payload, dict) and all(name in payload for name in (*REQUIRED, "time", "data"))):
        for name in (*REQUIRED, "data"):
            if not isinstance(payload, dict) or name not in payload:
                raise InvalidInput(f'not a CloudEvent: "{name}" is missing')
        if payload["specversion"] not in SPEC_VERSIONS:
            raise InvalidInput(f'not a CloudEvent: "specversion" must be one of {", ".join(SPEC_VERSIONS)}')
        attributes = {name: value for name, value in payload.items() if name != "data"}
        return payload["data"], Envelope("structured", attributes) if structured else None
    attributes = {name.removeprefix(PREFIX): value for name, value in headers.items() if name.startswith(PREFIX)}
    return payload, Envelope("binary", attributes) if all(name in attributes for name in REQUIRED) else None
