"""A summary of what is served, for people. It is logged at every start and printed by --check."""

from __future__ import annotations

from collections.abc import Iterable

from pinnace.inference.model import Model
from pinnace.settings import MIB, Settings


def summarize(models: Iterable[Model], settings: Settings) -> list[str]:
    """Return one line per model, then one with the limits that clients reach first."""
    return [
        *(f"{model.name}: {_describe(model)}" for model in models),
        f"limits: {settings.max_concurrent_requests} concurrent requests per model, {settings.max_batch_size} rows "
        f"per batch, {settings.max_body_bytes / MIB:g} MiB per body, {settings.request_timeout_seconds} s per request",
    ]


def _describe(model: Model) -> str:
    if not model.is_ready:
        return "not loaded"
    metadata = model.metadata
    return ", ".join(f"{name} {value}" for name, value in metadata.properties.items()) or metadata.platform or "ready"
