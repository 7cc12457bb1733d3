"""What the gRPC services have in common: the shape of their methods, in bytes, and how they read a message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import betterproto2
import grpc

from proto import wire
from serving.errors import InvalidInput
from serving.logs import public

M = TypeVar("M", bound=betterproto2.Message)

Metadata = Mapping[str, str]
Unary = Callable[[bytes, Metadata], Awaitable[bytes]]
Stream = Callable[[AsyncIterator[bytes], Metadata], AsyncIterator[bytes]]


class Service:
    """Methods by name, answered under each of the full service names; they raise ServingError."""

    names: tuple[str, ...]
    unary: dict[str, Unary]
    streams: dict[str, Stream]


def parse(message_class: type[M], message: bytes) -> M:
    """Raises InvalidInput."""
    with _refused(message_class):
        return wire.decode(message_class, message)


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


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """How a call that raised this ends; what nobody foresaw is logged and not told."""
    told = public(error)
    return grpc.StatusCode[told.grpc_status], str(told)
