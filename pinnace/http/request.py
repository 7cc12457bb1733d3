"""What comes over REST: its type, its body, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from pinnace.errors import ClientDisconnected, UnsupportedMediaType
from pinnace.observability.metrics import Metrics

# The form type is what `curl -d` sends, none at all what KServe's batcher sends: both mean JSON.
JSON_TYPES = {
    "",
    "application/json",
    "application/cloudevents+json",
    "application/ld+json",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "text/plain",
}


def media_type(headers: Mapping[str, str]) -> str:
    """The content type without its parameters; empty where there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def body_type(headers: Mapping[str, str], images: bool = False) -> str:
    """`json`, or `image` where those are welcome. Raises UnsupportedMediaType."""
    content_type = media_type(headers)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed: send it without Content-Encoding")
    if content_type in JSON_TYPES:
        return "json"
    if images and content_type.startswith("image/"):
        return "image"
    or_an_image = ", or an image as image/*" if images else ""
    raise UnsupportedMediaType(f"the body must be application/json{or_an_image}: see Content-Type")


async def read_body(request: Request) -> bytes:
    """Raises TooLarge, as rest_guard decides, and ClientLeft."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientDisconnected from None


async def read_inference(request: Request, metrics: Metrics, protocol: str) -> bytes:
    """The body of an inference request, timed and counted. Raises what `read_body` raises."""
    with metrics.stage("read"):
        body = await read_body(request)
    metrics.received(protocol, len(body))
    return body


@asynccontextmanager
async def cancel_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Around what answers a request that is read: cancelled where its client leaves. Raises ClientLeft then."""
    answering, left = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        if answering:
            answering.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and answering and not answering.uncancel():
            raise ClientDisconnected from None
        raise
    finally:
        watching.cancel()
        await asyncio.wait({watching})
