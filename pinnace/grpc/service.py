"""What the gRPC services have in common: the shape of their methods, in bytes, and how they read a message."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import betterproto2
import grpc

from pinnace.errors import InvalidInput
from pinnace.observability.logging import to_client_error
from pinnace.proto import wire

M = TypeVar("M", bound=betterproto2.Message)

MAX_FIELDS_ON_LOOP = 1000  # a millisecond: probes are everybody's

Metadata = Mapping[str, str]
Unary = Callable[[bytes, Metadata], Awaitable[bytes]]
Stream = Callable[[AsyncIterator[bytes], Metadata], AsyncIterator[bytes]]


PROBES = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
}
"""Methods that are everybody's."""


class Service:
    """Methods by name, answered under each of the full service names; they raise ServingError."""

    names: tuple[str, ...]
    unary: dict[str, Unary]
    streams: dict[str, Stream]


def parse(message_class: type[M], message: bytes, most_fields: int = MAX_FIELDS_ON_LOOP) -> M:
    """Raises InvalidInput."""
    with _refused(message_class):
        return wire.decode(message_class, message, most_fields)


def parse_text(message_class: type[M], message: bytes, number: int) -> str:
    """The one field, for where the whole may take too long. Raises InvalidInput."""
    with _refused(message_class):
        return wire.first_text(message, number)


@contextmanager
def _refused(message_class: type[M]) -> Iterator[None]:
    try:
        yield
    except wire.DecodeError as error:
        raise InvalidInput(f"not a {message_class.__name__} message: {error}") from None


def require_message(message: bytes | None) -> bytes:
    """The message of a call that has one. Raises InvalidInput."""
    if message is None:
        raise InvalidInput("the call has no message")
    return message


class Status(NamedTuple):
    """How a call ends, and after how long the client should try again (gRFC A6); never, if 0."""

    code: grpc.StatusCode
    text: str = ""
    pushback_ms: int = 0

    @property
    def trailers(self) -> tuple[tuple[str, str], ...]:
        return (("grpc-retry-pushback-ms", str(self.pushback_ms)),) if self.pushback_ms else ()


def to_status(error: Exception) -> Status:
    """Of a call that raised this; what nobody foresaw is logged and not told."""
    told = to_client_error(error)
    pushback_ms = math.ceil(told.retry_after_seconds * 1000) if told.retry else 0
    return Status(grpc.StatusCode[told.grpc_status], str(told), pushback_ms)
