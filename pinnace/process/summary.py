"""What is served, in a few lines for people: said at every start, and by --check."""

from __future__ import annotations

from collections.abc import Iterable

from pinnace.inference.model import Model
from pinnace.settings import MIB, Settings


def summary(models: Iterable[Model], settings: Settings) -> list[str]:
    """A line a model, then the limits that people meet first."""
    return [
        *(f"{model.name}: {_facts(model)}" for model in models),
        f"at most {settings.max_concurrent_requests} requests of a model at once, {settings.max_batch_size} rows in a "
        f"batch, {settings.max_body_bytes / MIB:g} MiB a body, {settings.request_timeout_seconds} s an answer",
    ]


def _facts(model: Model) -> str:
    if not model.is_ready:
        return "NOT SERVED"
    metadata = model.metadata
    return ", ".join(f"{name} {value}" for name, value in metadata.properties.items()) or metadata.platform or "ready"
