"""Codecs: the encoded forms of a request and its response, and what translates between them and tensors.

V1, V2 and gRPC each have one stateless codec. A codec runs on a worker thread, since a body can take milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

from pinnace.predictor import Request, Response

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """An inference request as it came over the network: the model it names, its body, and its headers."""

    model_name: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    """The HTTP headers or the gRPC metadata; names are in lower case."""


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """The response to one inference request: its body, and the HTTP headers that belong to it."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class IncomingRequest(Protocol[R_co]):
    """An inference request that a transport has begun to receive, and the response of type R that it will send."""

    headers: Mapping[str, str]
    """The HTTP headers or the gRPC metadata; names are in lower case."""

    @property
    def model_name(self) -> str:
        """Return the name of the model that the request is for. Raises InvalidInput if it names none."""

    async def read(self) -> bytes:
        """Return the body. Raises ServingError if its type is unsupported, or a limit is exceeded."""

    def while_answering(self) -> AbstractAsyncContextManager[None]:
        """Return what to hold while the request is answered, once its body is read. Entering may raise ServingError."""

    def make_response(self, encoded: EncodedResponse) -> R_co:
        """Return the transport's response."""


class Codec(Protocol):
    """Translates one protocol's requests and responses. It keeps nothing between two requests."""

    protocol: ClassVar[str]
    """The protocol's name in the metrics: v1, v2 or grpc."""

    def decode(self, encoded: EncodedRequest) -> Request:
        """Decode a request. How its response is to be encoded goes into `Request.response_format`.

        Raises:
            InvalidInput: The body is not a request of this protocol.
            TooLarge: The body would take too long to decode.
        """

    def encode(self, response: Response, request: Request) -> EncodedResponse:
        """Encode the response to `request`, which this codec has decoded.

        Raises:
            InvalidInput: The response has a tensor that this protocol cannot carry in the form that was requested.
        """
