"""The open calls of the gRPC port: counted, and ended if their client does not take the response."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import cast

from pinnace.inference.admission import ByteBudget

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
MIN_UNSENT_SECONDS = 1.0  # a response that waits for less is not ended, however few bytes are left

GRPC_CALL_COROUTINE = "_schedule_rpc_coro"


@dataclass(eq=False, slots=True)
class OpenCall:
    """One call, from the start of its handler until grpc has sent its response and status."""

    handler: asyncio.Task[None]
    is_stream: bool
    unsent_bytes: int = 0
    """The size of the response that waits to be sent."""
    unsent_since: float = 0.0


class OpenCalls:
    """The open calls. Their responses count in the byte budget until they are sent.

    A response that is not sent within the timeout ends its call, and so do those that wait longest when bytes are
    needed.
    """

    def __init__(self, byte_budget: ByteBudget, send_timeout_seconds: float) -> None:
        self._byte_budget = byte_budget
        self._timeout_seconds = send_timeout_seconds
        self._unary: set[OpenCall] = set()
        self._unsent: dict[OpenCall, None] = {}  # the longest waiting first
        self._no_unary = asyncio.Event()
        self._no_unary.set()
        byte_budget.reclaimers.append(self._reclaim)

    @property
    def num_unsent(self) -> int:
        """Return the number of unary calls whose response has waited for over a second. Safe to use from any thread.

        A shorter wait is that of every response: grpc reports it as sent some time after the client has it.
        """
        before = time.monotonic() - MIN_UNSENT_SECONDS
        return sum(not call.is_stream and call.unsent_since <= before for call in [*self._unsent])

    @property
    def has_unary(self) -> bool:
        """Return whether a unary call is open."""
        return bool(self._unary)

    def open(self, is_stream: bool) -> OpenCall:
        """Register the call that the current task handles, until the task ends."""
        handler = cast(asyncio.Task[None], asyncio.current_task())
        call = OpenCall(handler, is_stream)
        if not is_stream:
            self._unary.add(call)
            self._no_unary.clear()
        handler.add_done_callback(partial(self._close, call))
        return call

    def count_response(self, call: OpenCall, size_bytes: int) -> None:
        """Count a response of the call until it is sent. Raises Overloaded."""
        self._byte_budget.acquire(size_bytes)
        call.unsent_bytes, call.unsent_since = size_bytes, time.monotonic()
        self._unsent[call] = None

    def response_sent(self, call: OpenCall) -> None:
        """Give back the bytes of the call's response, if it has one that counts."""
        if call in self._unsent:
            del self._unsent[call]
            self._byte_budget.release(call.unsent_bytes)

    async def wait_until_no_unary(self) -> None:
        """Wait until no unary call is open."""
        await self._no_unary.wait()

    async def end_stalled(self) -> None:
        """End the calls whose response has waited for the timeout, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            stalled = self._waiting_for(self._timeout_seconds)
            if stalled:
                self._end(stalled)
                logger.warning(
                    "%d gRPC calls ended: their responses were not taken within send_timeout_seconds (%g)",
                    len(stalled),
                    self._timeout_seconds,
                )

    def _close(self, call: OpenCall, _: object) -> None:
        self.response_sent(call)
        self._unary.discard(call)
        if not self._unary:
            self._no_unary.set()

    def _reclaim(self, num_bytes: int) -> None:
        """End the calls whose responses have waited longest, until their responses sum up to the bytes."""
        ended: list[OpenCall] = []
        for call in self._waiting_for(MIN_UNSENT_SECONDS):
            if num_bytes <= 0:
                break
            num_bytes -= call.unsent_bytes
            ended.append(call)
        if ended:
            self._end(ended)
            logger.warning("%d gRPC calls ended: responses that were not taken filled max_queue_bytes", len(ended))

    def _waiting_for(self, seconds: float) -> list[OpenCall]:
        before = time.monotonic() - seconds
        return list(takewhile(lambda call: call.unsent_since <= before, self._unsent))

    def _end(self, calls: Collection[OpenCall]) -> None:
        for call in calls:
            self.response_sent(call)
        _cancel_calls({call.handler for call in calls})


def _cancel_calls(handlers: set[asyncio.Task[None]]) -> None:
    """Cancel the calls of these handlers in grpc's core, which frees their responses and resets their streams.

    grpc.aio has no method for that: once a handler has returned its response, the call waits for its client without a
    limit. But the core cancels a call when the last reference to it goes. That is the coroutine in which grpc.aio
    waits for the end of the call; it also refers to the handler's task, by which it is found here.
    """
    for task in asyncio.all_tasks():
        coroutine = task.get_coro()
        if getattr(coroutine, "__qualname__", "") == GRPC_CALL_COROUTINE:
            variables = [variable for scope in gc.get_referents(coroutine) for variable in gc.get_referents(scope)]
            if any(isinstance(variable, asyncio.Task) and variable in handlers for variable in variables):
                task.cancel()
    for handler in handlers:
        handler.cancel()
