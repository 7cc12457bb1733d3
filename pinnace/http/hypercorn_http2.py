"""HTTP/2 on the HTTP port: Hypercorn's, with what its release 0.18 lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypercorn.protocol
from h2.errors import ErrorCodes
from h2.events import Event, RequestReceived
from hypercorn.protocol.h2 import H2Protocol


class Http2(H2Protocol):
    """Lets the other streams of its connection live, and tells clients of a stopping server to go elsewhere.

    In Hypercorn the body of a request that was refused, or answered before it was read, ends the connection by a
    KeyError; and a refused stream is reset as if it had been answered, which no client repeats.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = _Streams()

    async def _handle_events(self, events: Sequence[Event]) -> None:
        kept: list[Event] = []
        for event in events:
            if isinstance(event, RequestReceived) and self.context.terminated.is_set():
                self.connection.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
            else:
                kept.append(event)
        await super()._handle_events(kept)


class _Streams(dict[int, Any]):
    """By their numbers; what comes for one that is gone is dropped."""

    def __missing__(self, number: int) -> _Gone:
        return _Gone()


class _Gone:
    async def handle(self, _: Any) -> None:
        pass


hypercorn.protocol.H2Protocol = Http2  # type: ignore[attr-defined, assignment]
