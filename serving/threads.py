"""The threads beside the event loop, which all models share: some decode requests to rows, one encodes answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from serving.logs import public

T = TypeVar("T")


class Threads:
    """Work given to them raises ServingError alone, here and on the thread: what nobody foresaw is logged there."""

    def __init__(self, decoders: int) -> None:
        self._decoders = ThreadPoolExecutor(decoders, "decoder")
        self._encoder = ThreadPoolExecutor(1, "encoder")  # of its own: an answer never waits behind what is to come

    async def decode(self, work: Callable[[], T]) -> T:
        return await _run(self._decoders, work)

    async def encode(self, work: Callable[[], T]) -> T:
        return await _run(self._encoder, work)

    def close(self) -> None:
        """Without waiting for work that is still running."""
        for pool in (self._decoders, self._encoder):
            pool.shutdown(wait=False, cancel_futures=True)


async def _run(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = copy_context()  # the request's id, for what is logged on the thread
    return await asyncio.get_running_loop().run_in_executor(pool, context.run, _guarded, work)


def _guarded(work: Callable[[], T]) -> T:
    """On the thread already, since a StopIteration would never reach the one who waits."""
    try:
        return work()
    except Exception as error:
        raise public(error) from None
