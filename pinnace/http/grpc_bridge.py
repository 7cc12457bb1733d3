"""gRPC calls on the HTTP port, over HTTP/2 with prior knowledge: one published port then carries both protocols.

A thin ASGI adapter over the services of the gRPC port. It costs two to four times the CPU of grpc.aio (measured): where
both ports are published, the gRPC port is better.

Wire format: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
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
from pinnace.grpc.service import Call, Gate, Metadata, Service, Status, Stream, Unary, to_status
from pinnace.http.hypercorn_patches import has_certificate
from pinnace.inference.admission import ByteBudget
from pinnace.settings import Settings

FRAME_PREFIX = struct.Struct(">BI")  # whether the message is compressed, and its length
WINDOW_BITS = {"gzip": 31, "deflate": 15}
TIMEOUT_UNIT_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
# A call with less time than this is refused: its client will have left before an answer reaches it.
MIN_CLIENT_TIMEOUT_SECONDS = 0.002
DEADLINE_EXCEEDED = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
METHOD_NOT_FOUND = Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

Inbox = asyncio.Queue[bytes | Exception | None]
"""The messages of a call as they arrive: an exception if they cannot be read, None after the last one."""


class GrpcBridge:
    """The ASGI application that answers gRPC calls on the HTTP port, with the services of the gRPC port.

    LimitsMiddleware around it reads what a failed call leaves unread.
    """

    def __init__(
        self, services: Sequence[Service], authenticator: Authenticator, byte_budget: ByteBudget, settings: Settings
    ) -> None:
        self._gate = Gate(authenticator, settings)
        self._byte_budget = byte_budget
        self._settings = settings
        self._max_message_bytes = settings.grpc_max_receive_message_length
        self._unary: dict[str, Unary] = {}
        self._streams: dict[str, Stream] = {}
        for service in services:
            for name in service.names:
                self._unary |= {f"/{name}/{method}": unary for method, unary in service.unary.items()}
                self._streams |= {f"/{name}/{method}": stream for method, stream in service.streams.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        metadata_bytes = len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        if metadata.get("te") != "trailers":
            # Hypercorn sends trailers only to clients that ask for them. Some gRPC clients do not, and without trailers
            # a call has no status.
            scope["headers"].append((b"te", b"trailers"))
        inbox: Inbox = asyncio.Queue(1)
        client = scope["client"][0] if scope["client"] else ""
        call = Call(
            scope["path"], metadata, metadata_bytes, client, has_certificate(scope), lambda: _next_message(inbox)
        )
        content_type = (b"content-type", b"application/grpc")
        await send({"type": "http.response.start", "status": 200, "headers": [content_type], "trailers": True})
        status = self._early_refusal(call)
        if status is None:
            try:
                with self._gate.admit(call, is_stream=call.path in self._streams):
                    status = await self._run(call, inbox, receive, send)
            except TooLarge as error:
                status = to_status(error)
        if status:
            await _send_status(status, send)

    def _early_refusal(self, call: Call) -> Status | None:
        """Return the status of a call that need not be begun, None for any other."""
        if call.path not in self._unary and call.path not in self._streams:
            return METHOD_NOT_FOUND
        seconds = _client_timeout_seconds(call.metadata)
        return DEADLINE_EXCEEDED if seconds is not None and seconds < MIN_CLIENT_TIMEOUT_SECONDS else None

    async def _run(self, call: Call, inbox: Inbox, receive: Receive, send: Send) -> Status | None:
        """Answer a call while its messages are read. Return its status, or None if the client has disconnected."""
        answering = asyncio.create_task(self._answer(call, send))
        reading = asyncio.create_task(self._read(receive, call.metadata, inbox, answering))
        try:
            await asyncio.wait({answering})
        finally:
            for task in (reading, answering):
                task.cancel()
            await asyncio.wait({reading, answering})
        return None if answering.cancelled() else answering.result()

    async def _answer(self, call: Call, send: Send) -> Status:
        """Send the responses to a call, and return the status that it ends with."""
        max_bytes = self._settings.grpc_max_send_message_length
        try:
            async with asyncio.timeout(_client_timeout_seconds(call.metadata)):
                async for message in self._responses(call):
                    if len(message) > max_bytes:
                        raise TooLarge(f"Sent message larger than max ({len(message)} vs. {max_bytes})")
                    body = FRAME_PREFIX.pack(0, len(message)) + message
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            return DEADLINE_EXCEEDED
        except Exception as error:
            return to_status(error)
        return Status(grpc.StatusCode.OK)

    async def _responses(self, call: Call) -> AsyncIterator[bytes]:
        if method := self._unary.get(call.path):
            yield await method(await self._gate.read_request(call), call.metadata)
        else:
            async for message in self._streams[call.path](self._gate.read_requests(call), call.metadata):
                yield message

    async def _read(self, receive: Receive, metadata: Metadata, inbox: Inbox, answering: asyncio.Task[Status]) -> None:
        """Put messages into the inbox as they arrive, counted against the byte budget until they are complete.

        Cancels the answer when the client disconnects.
        """
        buffer, has_more, deadline = bytearray(), True, None
        try:
            while has_more:
                event = await self._receive_before(deadline, receive)
                if event["type"] == "http.disconnect":
                    answering.cancel()
                    return
                self._byte_budget.acquire(len(event.get("body", b"")))
                buffer += event.get("body", b"")
                has_more = event.get("more_body", False)
                while (frame := self._pop_frame(buffer)) is not None:
                    await inbox.put(await _decompress(*frame, metadata, self._max_message_bytes))
                    deadline = None
                deadline = (deadline or time.monotonic() + self._settings.read_timeout_seconds) if buffer else None
            if buffer:
                raise InvalidInput("the call ends in the middle of a message")
            await inbox.put(None)
        except Exception as error:
            await inbox.put(error)
            return
        finally:
            self._byte_budget.release(len(buffer))
        while (await receive())["type"] != "http.disconnect":
            pass
        answering.cancel()

    async def _receive_before(self, deadline: float | None, receive: Receive) -> Message:
        """Return the next event. Raises RequestTimeout at the deadline, which a message has once it has begun."""
        try:
            async with asyncio.timeout(deadline and deadline - time.monotonic()):
                return await receive()
        except TimeoutError:
            raise RequestTimeout(self._settings.read_timeout_seconds) from None

    def _pop_frame(self, buffer: bytearray) -> tuple[bool, bytes] | None:
        """Remove the first complete message from the buffer; return whether it is compressed, and the message.

        Returns None if no message is complete. Raises TooLarge as soon as the length of a message is known.
        """
        if len(buffer) < FRAME_PREFIX.size:
            return None
        is_compressed, length = FRAME_PREFIX.unpack_from(buffer)
        if length > self._max_message_bytes:
            raise TooLarge(f"SERVER: Received message larger than max ({length} vs. {self._max_message_bytes})")
        end = FRAME_PREFIX.size + length
        if len(buffer) < end:
            return None
        message = bytes(buffer[FRAME_PREFIX.size : end])
        del buffer[:end]
        self._byte_budget.release(end)
        return bool(is_compressed), message


async def _send_status(status: Status, send: Send) -> None:
    """End the response to a call with its status."""
    trailers = [(b"grpc-status", b"%d" % status.code.value[0])]
    if status.text:
        trailers.append((b"grpc-message", quote(status.text, safe=PRINTABLE).encode()))
    trailers += [(name.encode(), value.encode()) for name, value in status.trailers]
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})


async def _next_message(inbox: Inbox) -> bytes | None:
    message = await inbox.get()
    if isinstance(message, Exception):
        raise message
    return message


async def _decompress(is_compressed: bool, message: bytes, metadata: Metadata, max_bytes: int) -> bytes:
    if not is_compressed:
        return message
    encoding = metadata.get("grpc-encoding", "identity")
    if encoding not in WINDOW_BITS:
        raise NotSupported(f"messages must be uncompressed or {' or '.join(WINDOW_BITS)}: see grpc-encoding")
    return await asyncio.to_thread(_inflate, message, WINDOW_BITS[encoding], max_bytes)


def _inflate(message: bytes, window_bits: int, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(window_bits)
    try:
        data = decompressor.decompress(message, max_bytes + 1)
    except zlib.error:
        raise InvalidInput("a compressed message is damaged") from None
    if len(data) > max_bytes:
        raise TooLarge(f"SERVER: Decompressed message larger than max ({max_bytes})")
    if not decompressor.eof:
        raise InvalidInput("a compressed message is truncated")
    return data


def _client_timeout_seconds(metadata: Mapping[str, Any]) -> float | None:
    """Return the timeout that the client has set for its call, None if it has set none."""
    match = re.fullmatch(r"(\d{1,8})([HMSmun])", metadata.get("grpc-timeout", ""))
    return int(match[1]) * TIMEOUT_UNIT_SECONDS[match[2]] if match else None
