"""The open connections of the HTTP port: how many there may be, and how long one may wait for its client."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from pinnace.inference.admission import ByteBudget

logger = logging.getLogger(__name__)

# At the limit, a connection that has waited this long for its client is closed before any idle one. A shorter wait may
# be that of a good client on a slow network.
STALL_SECONDS = 1.0
# A connection that has been idle for less may be about to send its first request, or its next.
MIN_IDLE_SECONDS = 0.1
# At the limit, this many new connections wait this long for one of the others to become idle before they are refused.
# Connections with pipelined requests are idle for an instant only, between two of them.
MAX_PENDING_CONNECTIONS = 16
PENDING_SECONDS = 1.0
# At a stop a client that does not read its responses has this long, rather than --send_timeout_seconds: otherwise it
# would hold the stop for the whole grace period.
DRAIN_SEND_SECONDS = 5.0
CHECK_PERIOD_SECONDS = 1.0
CHECKS_PER_TURN = 50  # of connections, which takes the event loop less than a millisecond


class Connection(Protocol):
    """A connection that the registry can close."""

    @property
    def unsent_bytes(self) -> int:
        """Return how many bytes the client has not taken yet."""

    def disconnect(self) -> None:
        """Close the socket; no request is in flight."""

    def abort(self) -> None:
        """Close the socket at once, and drop what waits to be sent."""

    def close_stalled(self, since: float) -> int:
        """Drop the responses that the client has not read from since that time. Return their number."""


class ConnectionRegistry:
    """The open connections, each busy with a request or idle. At the limit, a new one replaces another.

    A connection waits if its client must act before the server can go on: read a response, or finish its TLS handshake.
    """

    def __init__(self, max_connections: int, send_timeout_seconds: float) -> None:
        self.max_connections = max_connections
        self.byte_budget = ByteBudget(0)
        self._send_timeout_seconds = send_timeout_seconds
        self._busy: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when; the longest idle first
        self._unused: set[Connection] = set()  # those that no request has come on yet
        self._waiting: dict[Connection, float] = {}  # since when; the longest waiting first
        self._handshaking: set[Connection] = set()
        self._pending: dict[Connection, asyncio.Future[None]] = {}
        self._is_draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_sending(self) -> int:
        """Return how many connections have responses that their clients have not read yet."""
        return sum(connection.unsent_bytes > 0 for connection in [*self._waiting])  # another thread may ask

    def use_budget(self, byte_budget: ByteBudget) -> None:
        """Count the bytes that wait to be sent in this budget, which may abort a connection to make room."""
        self.byte_budget = byte_budget
        byte_budget.reclaimers.append(self._abort_longest_sending)

    async def wait_empty(self) -> None:
        """Wait until no connection is left."""
        await self._empty.wait()

    async def admit(self, connection: Connection) -> bool:
        """Register a new connection as idle. At the limit, close another for it; return False if all stay busy."""
        if self._make_room():
            self._register(connection)
            return True
        if self._has_flood():
            return False
        loop = asyncio.get_running_loop()
        admitted = self._pending[connection] = loop.create_future()
        deadline = loop.time() + PENDING_SECONDS
        try:
            while not admitted.done() and loop.time() < deadline:
                await asyncio.wait({admitted}, timeout=MIN_IDLE_SECONDS)
                self._admit_pending()  # another may have become old enough to be closed
        except BaseException:  # it is cancelled, perhaps just after it was admitted
            self.remove(connection)
            raise
        finally:
            self._pending.pop(connection, None)
        return admitted.done()

    def mark_idle(self, connection: Connection) -> None:
        """Register the connection as idle; a connection that is idle already keeps its place in the order."""
        self._empty.clear()
        self._busy.discard(connection)
        self._idle.setdefault(connection, asyncio.get_running_loop().time())
        self._admit_pending()

    def _register(self, connection: Connection) -> None:
        self._empty.clear()
        self._unused.add(connection)
        self._idle[connection] = asyncio.get_running_loop().time()

    def _admit_pending(self) -> None:
        """Let the first new connection that waits take the place of another, if there is one to close."""
        if self._pending and self._make_room():
            connection = next(iter(self._pending))
            self._pending.pop(connection).set_result(None)
            self._register(connection)

    def _has_flood(self) -> bool:
        """Return whether as many new connections wait to be admitted as may."""
        return len(self._pending) >= min(MAX_PENDING_CONNECTIONS, self.max_connections)

    def _make_room(self) -> bool:
        """Close a connection if the limit is reached. Return False if all are busy."""
        if len(self._busy) + len(self._idle) < self.max_connections:
            return True
        evicted = self._choose_evicted()
        if evicted is None:
            return False
        is_waiting = evicted in self._waiting
        self._forget(evicted)
        if is_waiting:
            evicted.abort()
        else:
            evicted.disconnect()
        return True

    def _choose_evicted(self) -> Connection | None:
        """Return the connection to close at the limit, None if all are busy.

        It is the one that has waited longest for its client, if that is over a second; or else the one that has been
        idle longest, unless it has just sent its last response or been accepted; or else any in its TLS handshake, then
        one that has waited for over 0.1 s, then any idle one that has had its turn. One that was just accepted is
        closed only in a flood: its request is about to come. A shorter wait for a client is that of every response.
        """
        now = asyncio.get_running_loop().time()
        waiting, waiting_since = next(iter(self._waiting.items()), (None, now))
        idle, idle_since = next(iter(self._idle.items()), (None, now))
        if waiting_since < now - STALL_SECONDS:
            return waiting
        if idle_since < now - MIN_IDLE_SECONDS:
            return idle
        silent = next((new for new in self._waiting if new in self._handshaking), None)
        if silent:
            return silent
        if waiting_since < now - MIN_IDLE_SECONDS:
            return waiting
        if self._has_flood():
            return idle
        return next((used for used in self._idle if used not in self._unused), None)

    def is_idle(self, connection: Connection) -> bool:
        """Return whether the connection is registered and has no request in flight."""
        return connection in self._idle

    def mark_busy(self, connection: Connection) -> None:
        """Register that a request is in flight on the connection."""
        self._idle.pop(connection, None)
        self._unused.discard(connection)
        self._busy.add(connection)

    def mark_waiting(self, connection: Connection) -> None:
        """Register that the connection waits for its client, from now on, unless it is being closed already."""
        if connection not in self._busy and connection not in self._idle:
            return
        self._waiting.pop(connection, None)
        self._waiting[connection] = asyncio.get_running_loop().time()
        self._admit_pending()

    def mark_proceeding(self, connection: Connection) -> None:
        """Register that the connection does not wait for its client any more."""
        self._waiting.pop(connection, None)

    def start_handshake(self, connection: Connection) -> bool:
        """Register that the connection waits for its client's TLS handshake. Return False if the server is stopping."""
        if self._is_draining:
            return False
        self._handshaking.add(connection)
        self.mark_waiting(connection)
        return True

    def end_handshake(self, connection: Connection) -> None:
        """Register that the TLS handshake has ended."""
        self._handshaking.discard(connection)
        self.mark_proceeding(connection)

    def remove(self, connection: Connection) -> None:
        """Remove the connection, if it is registered."""
        self._forget(connection)
        if not self._busy and not self._idle:
            self._empty.set()
        self._admit_pending()

    def _forget(self, connection: Connection) -> None:
        self._busy.discard(connection)
        self._idle.pop(connection, None)
        self._unused.discard(connection)
        self._waiting.pop(connection, None)

    def drain(self) -> None:
        """Give clients DRAIN_SEND_SECONDS to read, and abort the connections whose TLS handshake has not finished."""
        self._is_draining = True
        self._send_timeout_seconds = min(self._send_timeout_seconds, DRAIN_SEND_SECONDS)
        for connection in [*self._handshaking]:
            connection.abort()

    def abort_all(self) -> None:
        """Abort every connection."""
        for connection in [*self._busy, *self._idle]:
            connection.abort()

    async def close_stalled(self) -> None:
        """Drop the responses that clients do not read from in time, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_PERIOD_SECONDS)
            dropped = 0
            for number, connection in enumerate([*self._waiting], 1):
                dropped += connection.close_stalled(loop.time() - self._send_timeout_seconds)
                if number % CHECKS_PER_TURN == 0:
                    await asyncio.sleep(0)
            if dropped:
                logger.warning(
                    "%d responses dropped: their clients had read nothing for %g s", dropped, self._send_timeout_seconds
                )

    def _abort_longest_sending(self, num_bytes: int) -> None:
        """Abort the connections that have waited longest to send, until their bytes sum up to the number."""
        for connection in [waiting for waiting in self._waiting if waiting.unsent_bytes]:
            if num_bytes <= 0:
                return
            num_bytes -= connection.unsent_bytes
            self._waiting.pop(connection)
            connection.abort()
