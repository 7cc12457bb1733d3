"""The queue of data to send on one connection of the HTTP port, in bytes, with the time of the last progress."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, StreamBuffer

if TYPE_CHECKING:
    from hypercorn.typing import Event

    from pinnace.http.connections import Connection, ConnectionRegistry


@dataclass(eq=False, slots=True)
class _Item:
    """The bytes that one source, the socket or an HTTP/2 stream, waits to send, and when it last sent any."""

    size_bytes: int
    progressed_at: float


class SendQueue:
    """The data of one connection that its client has not taken: what the socket holds, and each HTTP/2 stream.

    Its bytes count in the byte budget, and the connection is registered as waiting while there are any.
    """

    def __init__(self, connection: Connection, connections: ConnectionRegistry) -> None:
        self._connection = connection
        self._connections = connections
        self._items: dict[Hashable, _Item] = {}  # the longest without progress first
        self._is_closed = False
        self.unsent_bytes = 0

    def add(self, source: Hashable, size_bytes: int) -> None:
        """Count bytes that `source` waits to send. If they exceed the budget, some connection is aborted."""
        if self._is_closed:
            return
        item = self._items.get(source)
        if item is None:
            item = self._items[source] = _Item(0, asyncio.get_running_loop().time())
            if len(self._items) == 1:
                self._connections.mark_waiting(self._connection)
                if source not in self._items:  # the connection has just been closed to make room for a new one
                    return
        item.size_bytes += size_bytes
        self.unsent_bytes += size_bytes
        self._connections.byte_budget.charge(size_bytes)

    def progress(self, source: Hashable, size_bytes: int) -> None:
        """Register that `source` has sent so many of its bytes."""
        item = self._items.pop(source, None)
        if item is None:
            return
        item.progressed_at = asyncio.get_running_loop().time()
        self._items[source] = item
        self._release(item, size_bytes)
        self._connections.mark_waiting(self._connection)

    def finish(self, source: Hashable) -> None:
        """Register that `source` waits no more: everything is sent, or dropped."""
        item = self._items.pop(source, None)
        if item is None:
            return
        self._release(item, item.size_bytes)
        if not self._items:
            self._connections.mark_proceeding(self._connection)

    def stalled_since(self, since: float) -> set[Hashable]:
        """Return the sources that have sent nothing since that time."""
        stalled: set[Hashable] = set()
        for source, item in self._items.items():
            if item.progressed_at > since:
                break  # and so have all after it
            stalled.add(source)
        return stalled

    def __contains__(self, source: Hashable) -> bool:
        return source in self._items

    @property
    def progressed_at(self) -> float:
        """Return when any source last sent anything; 0 if nothing waits."""
        return next(reversed(self._items.values())).progressed_at if self._items else 0.0

    def close(self) -> None:
        """Drop everything, and count nothing from now on: the connection is aborted."""
        self._is_closed = True
        for source in [*self._items]:
            self.finish(source)

    def _release(self, item: _Item, size_bytes: int) -> None:
        item.size_bytes -= size_bytes
        self.unsent_bytes -= size_bytes
        self._connections.byte_budget.release(size_bytes)


current_send_queue: ContextVar[SendQueue] = ContextVar("current_send_queue")
"""The queue of the connection whose task is running."""


class PatchedStreamBuffer(StreamBuffer):
    """The data of one HTTP/2 stream that its client has not given a window for, counted in the connection's SendQueue.

    It fixes this fault of Hypercorn: taking nothing from a full buffer lets the application go on, so that one which
    streams to a client without a window fills the memory. Here it goes on once the buffer is nearly empty.
    """

    def __init__(self, event_class: type[Event]) -> None:
        super().__init__(event_class)
        self._send_queue = current_send_queue.get()

    async def push(self, data: bytes) -> None:
        """Add data, and wait while there is too much of it. Raises BufferCompleteError."""
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        self._send_queue.add(self, len(data))
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        """Return and remove up to `max_length` bytes."""
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if not self.buffer:
            self._send_queue.finish(self)
            await self._is_empty.set()
        elif data:
            self._send_queue.progress(self, len(data))
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        return data

    async def close(self) -> None:
        """Drop the data, and let those go on who wait."""
        self._send_queue.finish(self)
        await super().close()
