"""Limits on what comes in over HTTP, before and around the application: pure ASGI."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import TooLarge

LINGER_SECONDS = 5.0


class BodyGuard:
    """Bounds a body by its Content-Length and by what arrives, and reads to its end what the application left.

    An answer to a body that nobody reads would reset the client's connection before it saw the answer, and blocks
    Hypercorn's `send` for ever once ten chunks wait: so the unread rest is dropped while the answer is sent.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, self._max_body_bytes)

        async def send_after_body(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not last or body.finished:
                await send(message)
                return
            rest = asyncio.create_task(body.drop_rest())
            try:
                await send({**message, "more_body": True})
                await asyncio.wait({rest}, timeout=LINGER_SECONDS)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                rest.cancel()
                await asyncio.wait({rest})

        await self._app(scope, body.receive, send_after_body)


class _Body:
    def __init__(self, scope: Scope, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._received_bytes = 0
        self._declared_bytes = next(
            (int(value) for name, value in scope["headers"] if name == b"content-length" and value.isdigit()), 0
        )
        self.finished = False

    async def receive(self) -> Message:
        """Raises TooLarge."""
        if self._declared_bytes > self._max_bytes:
            raise self._too_large()
        message = await self._next()
        if self._received_bytes > self._max_bytes:
            raise self._too_large()
        return message

    async def drop_rest(self) -> None:
        while not self.finished:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        self.finished = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body exceeds max_body_bytes ({self._max_bytes})")
