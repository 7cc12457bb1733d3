"""Clients that send the same prediction again and again, and tell an answer, a refusal and half an answer apart."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import httpx

from tests.support.clients import INFER, PREDICT, make_image_request
from tests.support.servers import Server

# In the last millisecond before it closes, grpc's core cancels calls that no handler has received.
REFUSALS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Refused(Exception):
    """The server did not accept the request: no part of an answer came."""


class Caller(ABC):
    """A client with one connection, which its first call opens."""

    @abstractmethod
    async def predict(self) -> list[float]:
        """Return the five highest logits. Raises Refused, and AssertionError for half an answer or a wrong one."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection."""


class KeepAlive(Caller):
    """HTTP/1.1, one request after another, written byte by byte: HTTP libraries would silently retry some failures."""

    def __init__(self, server: Server, body: bytes) -> None:
        self._address = ("127.0.0.1", server.http_port)
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PREDICT.encode(), len(body))
        self._request = head + body
        self._writer: asyncio.StreamWriter | None = None

    async def predict(self) -> list[float]:
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(*self._address)
            self._writer.write(self._request)
            await self._writer.drain()
            status = await self._reader.readline()
        except OSError as error:
            raise Refused from error
        if not status:
            raise Refused
        return await self._read_answer(status)

    async def close(self) -> None:
        if self._writer:
            self._writer.close()

    async def _read_answer(self, status: bytes) -> list[float]:
        assert status.startswith(b"HTTP/1.1 200 "), status
        length, closes = 0, False
        while (line := (await self._reader.readline()).lower()) != b"\r\n":
            assert line, "half an answer"
            name, _, value = line.partition(b":")
            length = int(value) if name == b"content-length" else length
            closes = closes or (name == b"connection" and value.strip() == b"close")
        answer = json.loads(await self._reader.readexactly(length))
        if closes and self._writer:
            self._writer.close()
            self._writer = None
        (row,) = answer["predictions"]
        return list(row)


class Http2(Caller):
    """HTTP/2 without TLS. httpx does not retry."""

    def __init__(self, server: Server, body: bytes) -> None:
        self._client = httpx.AsyncClient(base_url=server.url, http1=False, http2=True, timeout=60)
        self._body = body

    async def predict(self) -> list[float]:
        try:
            response = await self._client.post(PREDICT, content=self._body)
        except httpx.TransportError as error:
            raise Refused from error
        assert response.status_code == 200, response.text
        (row,) = response.json()["predictions"]
        return list(row)

    async def close(self) -> None:
        await self._client.aclose()


class Grpc(Caller):
    """gRPC, on either port."""

    def __init__(self, port: int, google: ModuleType, picture: bytes) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self._call: Any = self._channel.unary_unary(INFER, response_deserializer=google.ModelInferResponse.FromString)
        self._message = make_image_request(google, picture).SerializeToString()

    async def predict(self) -> list[float]:
        try:
            response = await self._call(self._message, timeout=60)
        except grpc.aio.AioRpcError as error:
            assert error.code() in REFUSALS, error
            raise Refused from error
        return list(response.outputs[0].contents.fp32_contents)

    async def close(self) -> None:
        await self._channel.close()
