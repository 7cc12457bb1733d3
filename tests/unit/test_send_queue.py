"""The queue of data to send on a connection, without a server."""

from __future__ import annotations

import asyncio

import pytest
from hypercorn.asyncio.worker_context import EventWrapper

from pinnace.errors import Overloaded
from pinnace.http.connections import ConnectionRegistry
from pinnace.http.send_queue import PatchedStreamBuffer, SendQueue, current_send_queue
from pinnace.inference.admission import ByteBudget

BUDGET_BYTES = 100


class Unread:
    """A connection of the registry whose client does not read."""

    def __init__(self, connections: ConnectionRegistry) -> None:
        self.queue = SendQueue(self, connections)
        self.is_aborted = False

    @property
    def unsent_bytes(self) -> int:
        """Return how many bytes the client has not taken yet."""
        return self.queue.unsent_bytes

    def disconnect(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Drop what waits."""
        self.is_aborted = True
        self.queue.close()

    def close_stalled(self, since: float) -> int:
        """Return how many sources have waited since that time."""
        return len(self.queue.stalled_since(since))


def make_connections() -> tuple[ConnectionRegistry, ByteBudget]:
    connections, budget = ConnectionRegistry(10, 30.0), ByteBudget(BUDGET_BYTES)
    connections.use_budget(budget)
    return connections, budget


async def open_connection(connections: ConnectionRegistry) -> Unread:
    connection = Unread(connections)
    assert await connections.admit(connection)
    return connection


async def test_the_connection_without_progress_for_longest_is_aborted_for_bytes_that_do_not_fit() -> None:
    connections, budget = make_connections()
    first, second, third = [await open_connection(connections) for _ in range(3)]
    for connection in (first, second, third):
        connection.queue.add("socket", 30)
    first.queue.progress("socket", 10)

    budget.acquire(40)

    assert [connection.is_aborted for connection in (first, second, third)] == [False, True, False]
    assert connections.num_sending == 2


async def test_a_response_that_exceeds_the_budget_alone_is_aborted_and_leaves_nothing_reserved() -> None:
    connections, budget = make_connections()
    unread = await open_connection(connections)
    unread.queue.add("stream 1", 60)
    unread.queue.add("stream 3", 60)

    assert unread.is_aborted
    budget.acquire(BUDGET_BYTES)
    with pytest.raises(Overloaded):
        budget.acquire(1)


async def test_a_body_larger_than_the_budget_aborts_nobody() -> None:
    connections, budget = make_connections()
    unread = await open_connection(connections)
    unread.queue.add("socket", 10)
    with pytest.raises(Overloaded):
        budget.acquire(BUDGET_BYTES + 1)

    assert not unread.is_aborted


async def test_a_source_is_stalled_if_it_alone_has_sent_nothing() -> None:
    connections, _ = make_connections()
    queue = Unread(connections).queue
    queue.add("stream 1", 10)
    queue.add("stream 3", 10)
    since = asyncio.get_running_loop().time()
    queue.progress("stream 3", 1)

    assert queue.stalled_since(since) == {"stream 1"}
    queue.finish("stream 1")
    assert queue.unsent_bytes == 9


async def test_an_application_that_streams_waits_while_its_client_gives_no_window() -> None:
    connections, _ = make_connections()
    current_send_queue.set(Unread(connections).queue)
    buffer = PatchedStreamBuffer(EventWrapper)
    sending = asyncio.create_task(buffer.push(bytes(40_000)))
    for _ in range(3):
        assert await buffer.pop(0) == b""
        assert not (await asyncio.wait({sending}, timeout=0.01))[0]

    await buffer.pop(40_000)
    await sending


async def test_a_connection_that_is_being_closed_makes_no_room_a_second_time() -> None:
    connections = ConnectionRegistry(1, 30.0)
    closed = await open_connection(connections)
    connections.mark_busy(closed)
    closed.queue.add("socket", 1)
    busy = await open_connection(connections)
    connections.mark_busy(busy)
    assert closed.is_aborted
    connections.mark_waiting(closed)

    assert not await connections.admit(Unread(connections))


async def test_a_connection_that_sends_its_response_is_not_closed_for_a_new_one() -> None:
    connections, budget = make_connections()
    connections.max_connections = 1
    sending = await open_connection(connections)
    connections.mark_busy(sending)
    waiting = asyncio.create_task(connections.admit(Unread(connections)))
    await asyncio.sleep(0)  # now it waits to be admitted

    sending.queue.add("socket", 50)

    assert not sending.is_aborted
    sending.queue.finish("socket")
    budget.acquire(BUDGET_BYTES)  # all bytes were given back
    connections.remove(sending)
    assert await waiting
