"""Limits on what comes in over HTTP, before and around the application: pure ASGI."""

from __future__ import annotations

import asyncio
import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pinnace.errors import HeadersTooLarge, RequestTimeout, TooLarge
from pinnace.http.response import error_response
from pinnace.inference.admission import ByteBudget
from pinnace.settings import Settings

LINGER_SECONDS = 5.0
MAX_HEADER_BYTES = 16 * 1024  # of request line and headers; Hypercorn itself counts only what is incomplete


class LimitsMiddleware:
    """Bounds a request's head, and its body by what is declared, what comes and when; reads what the application left.

    An answer to a body that nobody reads would reset the client's connection before it saw the answer, and blocks
    Hypercorn's `send` for ever once ten chunks wait: so the unread rest is dropped while the answer is sent.
    """

    def __init__(self, app: ASGIApp, byte_budget: ByteBudget, settings: Settings, endless: bool = False) -> None:
        """`endless` bodies may take any time and size: they are messages, which the application limits and counts."""
        self._app = app
        self._byte_budget = byte_budget
        self._settings = settings
        self._endless = endless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, self._byte_budget, self._settings, self._endless)

        async def send_after_body(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not last or body.finished:
                await send(message)
                return
            rest = asyncio.create_task(body.drop_rest())
            try:
                await send({**message, "more_body": True})
                await asyncio.wait({rest}, timeout=min(LINGER_SECONDS, self._settings.read_timeout_seconds))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                rest.cancel()
                await asyncio.wait({rest})

        try:
            await self._app_for(scope)(scope, body.receive, send_after_body)
        finally:
            self._byte_budget.release(body.held_bytes)

    def _app_for(self, scope: Scope) -> ASGIApp:
        size_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        size_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if size_bytes <= MAX_HEADER_BYTES:
            return self._app
        return error_response(HeadersTooLarge(MAX_HEADER_BYTES))


class _Body:
    def __init__(
        self, scope: Scope, receive: Receive, byte_budget: ByteBudget, settings: Settings, endless: bool
    ) -> None:
        self._receive = receive
        self._byte_budget = byte_budget
        self._settings = settings
        self._endless = endless
        self._most_bytes = math.inf if endless else settings.max_body_bytes
        self._deadline = None if endless else asyncio.get_running_loop().time() + settings.read_timeout_seconds
        self._declared_bytes = next(
            (int(value) for name, value in scope["headers"] if name == b"content-length" and value.isdigit()), 0
        )
        self.held_bytes = 0
        self.finished = False

    async def receive(self) -> Message:
        """Raises TooLarge, TooSlow and Overloaded."""
        if self._declared_bytes > self._most_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(None if self.finished else self._deadline):
                message = await self._next()
        except TimeoutError:
            raise RequestTimeout(self._settings.read_timeout_seconds) from None
        size_bytes = len(message.get("body", b""))
        if self.held_bytes + size_bytes > self._most_bytes:
            raise self._too_large()
        if not self._endless:
            self._byte_budget.acquire(size_bytes)
            self.held_bytes += size_bytes
        return message

    async def drop_rest(self) -> None:
        while not self.finished:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.finished = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body exceeds max_body_bytes ({self._settings.max_body_bytes})")
