"""The base of the gRPC services: the shape of their methods, how a message is read, and what every call must pass.

Both ports call the services: `grpc.server` with grpc.aio, and `http.grpc_bridge` on the HTTP port.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import betterproto2
import grpc

from pinnace.auth import Authenticator
from pinnace.errors import HeadersTooLarge, InvalidInput, RequestTimeout, TooLarge
from pinnace.observability.logging import to_client_error
from pinnace.proto import wire
from pinnace.settings import Settings

M = TypeVar("M", bound=betterproto2.Message)

MAX_METADATA_BYTES = 16 * 1024  # of the path and all metadata of a call, as for the headers of REST
MAX_OPEN_CALLS = 1000  # per port
MAX_STREAMS_PER_CLIENT = 100  # open streaming calls of one address: 1,000 watchers cost as much as 1,000 connections
MAX_FIELDS_ON_LOOP = 1000  # a millisecond of decoding on the event loop, for messages of any client

Metadata = Mapping[str, str]
Unary = Callable[[bytes, Metadata], Awaitable[bytes]]
Stream = Callable[[AsyncIterator[bytes], Metadata], AsyncIterator[bytes]]

PUBLIC_METHODS = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
}
"""Methods that need no authentication: probes."""


class Service:
    """A gRPC service: methods by name, served under each of the full service names. Methods raise ServingError."""

    names: tuple[str, ...]
    unary: dict[str, Unary]
    streams: dict[str, Stream]


class Status(NamedTuple):
    """How a call ends, and after how many milliseconds the client should try again; 0 means not at all.

    The delay is gRFC A6's server pushback: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
    """

    code: grpc.StatusCode
    text: str = ""
    pushback_ms: int = 0

    @property
    def trailers(self) -> tuple[tuple[str, str], ...]:
        """Return the trailing metadata that tell the client when to try again."""
        return (("grpc-retry-pushback-ms", str(self.pushback_ms)),) if self.pushback_ms else ()


@dataclass(frozen=True, slots=True)
class Call:
    """One call as its port sees it. `receive` returns the next message, or None after the last one.

    `metadata_bytes` counts the path and all entries of the metadata, also those that `metadata` lacks.
    """

    path: str
    metadata: Metadata
    metadata_bytes: int
    client: str
    """The client's address, without the port."""
    has_certificate: bool
    receive: Callable[[], Awaitable[bytes | None]]


class Gate:
    """The checks that every call must pass on both ports.

    They are the number of open calls, the size of the metadata, authentication, and a deadline for the first message.
    """

    def __init__(self, authenticator: Authenticator, settings: Settings) -> None:
        self._authenticator = authenticator
        self._read_timeout_seconds = settings.read_timeout_seconds
        self._num_open = 0
        self._streams_by_client: Counter[str] = Counter()

    @contextmanager
    def admit(self, call: Call, is_stream: bool) -> Iterator[None]:
        """Count the call as open for the body of a `with` statement. Raises TooLarge if a limit is reached."""
        if self._num_open >= MAX_OPEN_CALLS:
            raise TooLarge(f"the port has {MAX_OPEN_CALLS} open calls; try again later")
        if is_stream and self._streams_by_client[call.client] >= MAX_STREAMS_PER_CLIENT:
            raise TooLarge(f"the client has {MAX_STREAMS_PER_CLIENT} open streaming calls")
        self._num_open += 1
        self._streams_by_client[call.client] += is_stream
        try:
            yield
        finally:
            self._num_open -= 1
            self._streams_by_client[call.client] -= is_stream
            if not self._streams_by_client[call.client]:
                del self._streams_by_client[call.client]

    async def read_request(self, call: Call) -> bytes:
        """Return the message of a unary call.

        Raises HeadersTooLarge, Unauthenticated, RequestTimeout, InvalidInput if the call has no message, and what
        `call.receive` raises.
        """
        message = await self._read_first(call)
        if message is None:
            raise InvalidInput("the call has no message")
        return message

    async def read_requests(self, call: Call) -> AsyncIterator[bytes]:
        """Yield the messages of a streaming call. Only the wait for the first has a deadline here.

        Raises, at the first iteration, HeadersTooLarge, Unauthenticated and RequestTimeout; at any, what `call.receive`
        raises.
        """
        message = await self._read_first(call)
        while message is not None:
            yield message
            message = await call.receive()

    async def _read_first(self, call: Call) -> bytes | None:
        if call.metadata_bytes > MAX_METADATA_BYTES:
            raise HeadersTooLarge(MAX_METADATA_BYTES)
        if call.path not in PUBLIC_METHODS:
            self._authenticator.check(call.metadata.get("authorization", ""), call.has_certificate)
        try:
            async with asyncio.timeout(self._read_timeout_seconds):
                return await call.receive()
        except TimeoutError:
            raise RequestTimeout(self._read_timeout_seconds) from None


def to_status(error: Exception) -> Status:
    """Return the status of a call that raised `error`. An unexpected error is logged, and its text is not sent."""
    client_error = to_client_error(error)
    pushback_ms = math.ceil(client_error.retry_after_seconds * 1000) if client_error.retry else 0
    return Status(grpc.StatusCode[client_error.grpc_status], str(client_error), pushback_ms)


def parse(message_class: type[M], message: bytes, max_fields: int = MAX_FIELDS_ON_LOOP) -> M:
    """Return the decoded message. Raises InvalidInput."""
    with _decode_errors_as_invalid_input(message_class):
        return wire.decode(message_class, message, max_fields)


def parse_text(message_class: type[M], message: bytes, field_number: int) -> str:
    """Return the string field with this number, empty if absent, without decoding the rest of the message.

    The rest may take longer than the event loop can be blocked. Raises InvalidInput, also if the field is not among the
    first 1,000.
    """
    with _decode_errors_as_invalid_input(message_class):
        return wire.first_text(message, field_number)


@contextmanager
def _decode_errors_as_invalid_input(message_class: type[M]) -> Iterator[None]:
    try:
        yield
    except wire.DecodeError as error:
        raise InvalidInput(f"not a {message_class.__name__} message: {error}") from None
