"""The open connections of the HTTP port, limited in number."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Connection(Protocol):
    """A connection that the registry can close."""

    def disconnect(self) -> None:
        """Close the socket; no request is in flight."""


class ConnectionRegistry:
    """The open connections, each busy with a request or idle. At the limit, a new one replaces the longest idle."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._busy: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._empty = asyncio.Event()
        self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until no connection is left."""
        await self._empty.wait()

    def evict_idle(self) -> bool:
        """Close the connection that has been idle longest if the limit is reached. Return False if all are busy."""
        if len(self._busy) + len(self._idle) < self._max_connections:
            return True
        if not self._idle:
            return False
        oldest = next(iter(self._idle))
        self.remove(oldest)
        oldest.disconnect()
        return True

    def mark_idle(self, connection: Connection) -> None:
        """Register the connection as idle; a connection that is idle already keeps its place in the order."""
        self._empty.clear()
        self._busy.discard(connection)
        self._idle.setdefault(connection)

    def is_idle(self, connection: Connection) -> bool:
        """Return whether the connection is registered and has no request in flight."""
        return connection in self._idle

    def mark_busy(self, connection: Connection) -> None:
        """Register that a request is in flight on the connection."""
        self._idle.pop(connection, None)
        self._busy.add(connection)

    def remove(self, connection: Connection) -> None:
        """Remove the connection, if it is registered."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)
        if not self._busy and not self._idle:
            self._empty.set()
