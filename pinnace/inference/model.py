"""The model interface: what the server asks of a model, wherever that model runs."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import EncodedResponse
from pinnace.predictor import ModelMetadata


class Model(ABC):
    """A model that is served under a name. It is loaded and unloaded from a thread, and called from the event loop."""

    def __init__(self, name: str, metadata: ModelMetadata) -> None:
        self.name = name
        self.metadata = metadata
        """The facts about the model that clients may know; while it is not loaded, those of its predictor's class."""
        self.is_ready = False
        """Whether a request would be answered now."""

    @property
    def state(self) -> str:
        """Return the state as the index of Triton's model repository extension names it."""
        return "READY" if self.is_ready else "UNAVAILABLE"

    @abstractmethod
    def load(self) -> None:
        """Load the model, which takes seconds; do nothing if it is loaded. Raises StartupError."""

    @abstractmethod
    def unload(self) -> None:
        """Free the model's memory once the requests inside it are answered."""

    @abstractmethod
    async def infer(self, call: InferenceCall) -> EncodedResponse:
        """Answer one request. If cancelled, steps that have not started are skipped. Raises ServingError."""

    async def wait_until_ready_changes(self) -> None:
        """Return when `is_ready` has changed without a load or an unload. Here: never."""
        await asyncio.Event().wait()

    @abstractmethod
    def close(self) -> None:
        """Release what outlives the process, without waiting."""
