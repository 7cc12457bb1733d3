"""What is served under a name, wherever it runs: its state, what clients are told of it, and its answers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from pinnace.errors import ModelNotReady
from pinnace.observability.timings import Latency
from pinnace.predictor import ModelMetadata, Request, Response

T = TypeVar("T")


class Model(ABC):
    """Loaded and unloaded from a thread, asked from the event loop."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether a request would be answered now."""

    @property
    @abstractmethod
    def metadata(self) -> ModelMetadata:
        """For the metadata."""

    @property
    def state(self) -> str:
        """As the index of Triton's model repository says it."""
        return "READY" if self.ready else "UNAVAILABLE"

    def check_ready(self) -> None:
        """Raises ModelNotReady."""
        if not self.ready:
            raise ModelNotReady(self.name)

    @abstractmethod
    def load(self) -> None:
        """Takes seconds; nothing, where the model is loaded already. Raises StartError."""

    @abstractmethod
    def unload(self) -> None:
        """Gives its memory back, once the requests inside it are answered."""

    @abstractmethod
    async def infer(self, decode: Callable[[], Request], encode: Callable[[Response], T], latency: Latency) -> T:
        """Answer one request; `decode` and `encode` are the transport's, called on threads.

        Raises ServingError. Cancelled, it gives up what has not started.
        """

    async def changes(self) -> None:
        """Returns when `ready` is another without a load or an unload; waits for ever where that cannot be."""
        await asyncio.Event().wait()

    @abstractmethod
    def close(self) -> None:
        """At the end of the process; waits for nothing."""
