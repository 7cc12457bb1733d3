"""HTTP requests: the type of the body, the body, and whether the client is still connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from pinnace.errors import ClientDisconnected, UnsupportedMediaType

# The form type is what `curl -d` sends, and KServe's batcher sends no type at all: both mean JSON.
JSON_TYPES = {
    "",
    "application/json",
    "application/cloudevents+json",
    "application/ld+json",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "text/plain",
}
IMAGE_TYPES = "image/"


def media_type(headers: Mapping[str, str]) -> str:
    """Return the content type in lower case, without parameters; empty if the request has none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_content_type(headers: Mapping[str, str], allow_images: bool = False) -> None:
    """Raise UnsupportedMediaType unless the body is uncompressed JSON, or an image where images are allowed."""
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed: send it without Content-Encoding")
    content_type = media_type(headers)
    if content_type in JSON_TYPES or (allow_images and content_type.startswith(IMAGE_TYPES)):
        return
    or_an_image = ", or an image as image/*" if allow_images else ""
    raise UnsupportedMediaType(f"the body must be application/json{or_an_image}: see Content-Type")


async def read_body(request: Request) -> bytes:
    """Return the whole body.

    Raises:
        TooLarge, RequestTimeout, Overloaded: A limit of `http.limits` is exceeded.
        ClientDisconnected: The client disconnected before the end of the body.
    """
    try:
        # Not request.body(), which keeps the body until the response is sent, and a client may read that slowly.
        return b"".join([chunk async for chunk in request.stream()])
    except ClientDisconnect:
        raise ClientDisconnected from None


@asynccontextmanager
async def cancel_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the body of an `async with` statement if the client disconnects. Raises ClientDisconnected then.

    Enter it after the request's body is read: it consumes what else the client sends.
    """
    handler, has_disconnected = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal has_disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_disconnected = True
        if handler:
            handler.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if has_disconnected and handler and not handler.uncancel():
            raise ClientDisconnected from None
        raise
    finally:
        # The loop ends it in its next turn. To wait for that here would resume all coroutines of the request once more.
        watcher.cancel()
