"""gRPC calls that reach the HTTP port, in HTTP/2 with prior knowledge: one published port then carries both.

A thin ASGI adapter over the services of the gRPC port. It costs two to four times the CPU of grpc.aio (measured): where
both ports are published, that one is better. Wire format: gRPC's PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import re
import struct
import time
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import grpc
from starlette.types import Message, Receive, Scope, Send

from pinnace.auth import Authenticator
from pinnace.errors import InvalidInput, NotSupported, RequestTimeout, TooLarge
from pinnace.grpc.service import PROBES, Metadata, Service, Status, Stream, Unary, require_message, to_status
from pinnace.http.hypercorn_patches import has_certificate
from pinnace.inference.admission import ByteBudget
from pinnace.settings import Settings

PREFIX = struct.Struct(">BI")
WINDOW_BITS = {"gzip": 31, "deflate": 15}
TIMEOUT_UNIT_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

OK = Status(grpc.StatusCode.OK)


class GrpcOverHttp:
    """The ASGI application of one call; behind a Guard, which reads what a failed call leaves unread."""

    def __init__(
        self, services: Sequence[Service], credentials: Authenticator, bodies: ByteBudget, settings: Settings
    ) -> None:
        self._bodies = bodies
        self._credentials = credentials
        self._settings = settings
        self._limit = settings.grpc_max_receive_message_length
        self._methods: dict[str, Stream] = {}
        for service in services:
            for name in service.names:
                self._methods |= {f"/{name}/{method}": _as_stream(call) for method, call in service.unary.items()}
                self._methods |= {f"/{name}/{method}": call for method, call in service.streams.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        content_type = (b"content-type", b"application/grpc")
        await send({"type": "http.response.start", "status": 200, "headers": [content_type], "trailers": True})
        inbox: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)
        answering = asyncio.create_task(self._answer(scope, metadata, _messages(inbox), send))
        reading = asyncio.create_task(self._read(receive, metadata, inbox, answering))
        try:
            await asyncio.wait({answering})
        finally:
            for task in (reading, answering):
                task.cancel()
            await asyncio.wait({reading, answering})
        if answering.cancelled():  # the client left
            return
        status = answering.result()
        trailers = [(b"grpc-status", b"%d" % status.code.value[0])]
        if status.text:
            trailers.append((b"grpc-message", quote(status.text, safe=PRINTABLE).encode()))
        trailers += [(name.encode(), value.encode()) for name, value in status.trailers]
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    async def _answer(self, scope: Scope, metadata: Metadata, messages: AsyncIterator[bytes], send: Send) -> Status:
        """Sends the messages of the answer, and returns how the call ended."""
        path = scope["path"]
        method = self._methods.get(path)
        if method is None:
            return Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        try:
            if path not in PROBES:
                self._credentials.check(metadata.get("authorization", ""), has_certificate(scope))
            async with asyncio.timeout(_timeout_seconds(metadata)):
                async for message in method(messages, metadata):
                    if len(message) > self._settings.grpc_max_send_message_length:
                        raise TooLarge(f"Sent message larger than max ({len(message)})")
                    body = PREFIX.pack(0, len(message)) + message
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            return Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        except Exception as error:
            return to_status(error)
        return OK

    async def _read(
        self,
        receive: Receive,
        metadata: Metadata,
        inbox: asyncio.Queue[bytes | Exception | None],
        answering: asyncio.Task[Status],
    ) -> None:
        """Hands messages to the call as they come, and cancels it when its client leaves; counts those to come."""
        buffer, more, deadline = bytearray(), True, None
        try:
            while more:
                event = await self._event(receive, deadline)
                if event["type"] == "http.disconnect":
                    answering.cancel()
                    return
                self._bodies.take(len(event.get("body", b"")))
                buffer += event.get("body", b"")
                more = event.get("more_body", False)
                while (frame := self._take(buffer)) is not None:
                    await inbox.put(await _decompressed(*frame, metadata, self._limit))
                    deadline = None
                deadline = (deadline or time.monotonic() + self._settings.read_timeout_seconds) if buffer else None
            if buffer:
                raise InvalidInput("the call ends in the middle of a message")
            await inbox.put(None)
        except Exception as error:
            await inbox.put(error)
            return
        finally:
            self._bodies.give_back(len(buffer))
        while (await receive())["type"] != "http.disconnect":
            pass
        answering.cancel()

    async def _event(self, receive: Receive, deadline: float | None) -> Message:
        """The next one; before the deadline, where a message has begun already. Raises TooSlow."""
        try:
            async with asyncio.timeout(deadline and deadline - time.monotonic()):
                return await receive()
        except TimeoutError:
            raise RequestTimeout(self._settings.read_timeout_seconds) from None

    def _take(self, buffer: bytearray) -> tuple[bool, bytes] | None:
        """The first whole message, whether it is compressed, and removes it. Raises TooLarge before it has come."""
        if len(buffer) < PREFIX.size:
            return None
        compressed, length = PREFIX.unpack_from(buffer)
        if length > self._limit:
            raise TooLarge(f"SERVER: Received message larger than max ({length} vs. {self._limit})")
        end = PREFIX.size + length
        if len(buffer) < end:
            return None
        message = bytes(buffer[PREFIX.size : end])
        del buffer[:end]
        self._bodies.give_back(end)
        return bool(compressed), message


def _as_stream(method: Unary) -> Stream:
    async def answers(messages: AsyncIterator[bytes], metadata: Metadata) -> AsyncIterator[bytes]:
        yield await method(require_message(await anext(messages, None)), metadata)

    return answers


async def _messages(inbox: asyncio.Queue[bytes | Exception | None]) -> AsyncIterator[bytes]:
    while (message := await inbox.get()) is not None:
        if isinstance(message, Exception):
            raise message
        yield message


async def _decompressed(compressed: bool, message: bytes, metadata: Metadata, limit: int) -> bytes:
    if not compressed:
        return message
    encoding = metadata.get("grpc-encoding", "identity")
    if encoding not in WINDOW_BITS:
        raise NotSupported(f"messages are read as they are or in {' or '.join(WINDOW_BITS)}, see grpc-encoding")
    return await asyncio.to_thread(_inflate, message, WINDOW_BITS[encoding], limit)


def _inflate(message: bytes, window_bits: int, limit: int) -> bytes:
    decompressor = zlib.decompressobj(window_bits)
    try:
        plain = decompressor.decompress(message, limit + 1)
    except zlib.error:
        raise InvalidInput("a compressed message is damaged") from None
    if len(plain) > limit:
        raise TooLarge(f"SERVER: Decompressed message larger than max ({limit})")
    if not decompressor.eof:
        raise InvalidInput("a compressed message is truncated")
    return plain


def _timeout_seconds(metadata: Mapping[str, Any]) -> float | None:
    found = re.fullmatch(r"(\d{1,8})([HMSmun])", metadata.get("grpc-timeout", ""))
    return int(found[1]) * TIMEOUT_UNIT_SECONDS[found[2]] if found else None
