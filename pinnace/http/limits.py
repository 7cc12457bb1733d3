"""Limits on HTTP requests: the size of the headers, and the size and duration of the body."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pinnace.errors import HeadersTooLarge, RequestTimeout, TooLarge
from pinnace.http.response import error_response
from pinnace.inference.admission import ByteBudget
from pinnace.settings import Settings

LINGER_SECONDS = 5.0
SILENCE_SECONDS = 0.1
MAX_HEADER_BYTES = 16 * 1024  # of request line and headers; Hypercorn's own limit applies only to incomplete headers


class LimitsMiddleware:
    """ASGI middleware that limits headers and bodies, and drains what the application left unread.

    A response to a request with an unread body would reset the connection before the client reads the response. It also
    blocks Hypercorn's `send` forever once ten chunks are queued. Therefore the rest of the body is read and dropped
    while the response is sent.
    """

    def __init__(self, app: ASGIApp, byte_budget: ByteBudget, settings: Settings, streaming: bool = False) -> None:
        """Wrap `app`. If `streaming`, headers and bodies of any size pass: the application has limits of its own."""
        self._app = app
        self._byte_budget = byte_budget
        self._settings = settings
        self._streaming = streaming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_body = _LimitedBody(scope, receive, self._byte_budget, self._settings, self._streaming)
        if self._streaming:
            await self._stream(scope, request_body, send)
            return

        async def send_after_body(message: Message) -> None:
            if message["type"] == "http.response.start":  # the body has been used, and its client may read slowly
                request_body.release()
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not is_last or request_body.finished:
                await send(message)
                return
            drain = asyncio.create_task(request_body.drain())
            try:
                await send({**message, "more_body": True})
                await asyncio.wait({drain}, timeout=min(LINGER_SECONDS, self._settings.read_timeout_seconds))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                drain.cancel()
                await asyncio.wait({drain})

        try:
            await self._app_for(scope)(scope, request_body.receive, send_after_body)
        finally:
            request_body.release()

    async def _stream(self, scope: Scope, request_body: _LimitedBody, send: Send) -> None:
        """Run the application. Its response ends when the client is silent: it may leave a call open that has failed.

        What is on its way is read first: Hypercorn would answer it with a reset, which overtakes the status.
        """
        drain: asyncio.Task[None] | None = None

        async def send_beside_body(message: Message) -> None:
            nonlocal drain
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if is_last and not request_body.finished:
                await request_body.drain_until_silent()
                drain = asyncio.create_task(request_body.drain())
            await send(message)

        try:
            await self._app(scope, request_body.receive, send_beside_body)
        finally:
            if drain:
                await asyncio.wait({drain}, timeout=LINGER_SECONDS)  # the end of the response ends the body
                drain.cancel()

    def _app_for(self, scope: Scope) -> ASGIApp:
        size_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        size_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if size_bytes <= MAX_HEADER_BYTES:
            return self._app
        return error_response(HeadersTooLarge(MAX_HEADER_BYTES))


class _LimitedBody:
    """The body of one request, limited and counted as it arrives."""

    def __init__(
        self, scope: Scope, receive: Receive, byte_budget: ByteBudget, settings: Settings, streaming: bool
    ) -> None:
        self._receive = receive
        self._byte_budget = byte_budget
        self._settings = settings
        self._streaming = streaming
        self._max_bytes = math.inf if streaming else settings.max_body_bytes
        self._deadline = None if streaming else asyncio.get_running_loop().time() + settings.read_timeout_seconds
        self._declared_bytes = next(
            (int(value) for name, value in scope["headers"] if name == b"content-length" and value.isdigit()), 0
        )
        self._received_bytes = 0
        self._reserved_bytes = 0
        self.finished = False

    async def receive(self) -> Message:
        """Receive the next message of the request. Raises TooLarge, RequestTimeout and Overloaded."""
        if self._declared_bytes > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(None if self.finished else self._deadline):
                message = await self._next()
        except TimeoutError:
            raise RequestTimeout(self._settings.read_timeout_seconds) from None
        size_bytes = len(message.get("body", b""))
        self._received_bytes += size_bytes
        if self._received_bytes > self._max_bytes:
            raise self._too_large()
        if not self._streaming:
            self._byte_budget.acquire(size_bytes)
            self._reserved_bytes += size_bytes
        return message

    def release(self) -> None:
        """Give the bytes received so far back to the byte budget."""
        self._byte_budget.release(self._reserved_bytes)
        self._reserved_bytes = 0

    async def drain(self) -> None:
        while not self.finished:
            await self._next()

    async def drain_until_silent(self) -> None:
        """Read and drop the body until its end, or until nothing arrives for a moment; for five seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.finished:
                    await asyncio.wait_for(self._next(), SILENCE_SECONDS)

    async def _next(self) -> Message:
        message = await self._receive()
        self.finished = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body exceeds max_body_bytes ({self._settings.max_body_bytes})")
