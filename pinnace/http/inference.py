"""Inference over HTTP: read the body, run the inference, respond. V1 and V2 differ only in their codec."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from pinnace.http.request import cancel_on_disconnect, read_body
from pinnace.inference.codec import Codec, EncodedResponse
from pinnace.inference.dataplane import DataPlane, run_inference
from pinnace.observability.timings import RequestTimings, current_timings


class HttpCodec(Codec, Protocol):
    """A codec of bodies with HTTP headers, which tell whether it can decode a body."""

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Raise UnsupportedMediaType if `decode` does not take a body with these headers."""


class HttpIncomingRequest:
    """The IncomingRequest of an HTTP request, whose body is not read yet."""

    def __init__(self, request: HttpRequest, codec: HttpCodec, timings: RequestTimings) -> None:
        self.model_name: str = request.path_params["model"]
        self.headers: Mapping[str, str] = dict(request.headers)
        self._request = request
        self._codec = codec
        self._timings = timings

    async def read(self) -> bytes:
        """Return the body, after a look at its type. Raises UnsupportedMediaType, and what `read_body` raises."""
        self._codec.check_headers(self.headers)
        started_at = time.perf_counter()
        body = await read_body(self._request)
        self._timings.stages["read"] = time.perf_counter() - started_at
        return body

    def while_answering(self) -> AbstractAsyncContextManager[None]:
        """Return a context that ends with ClientDisconnected if the client disconnects."""
        return cancel_on_disconnect(self._request)

    def make_response(self, encoded: EncodedResponse) -> HttpResponse:
        """Return the HTTP response, with the header that says where the time went."""
        headers = {**encoded.headers, "server-timing": self._timings.server_timing}
        return HttpResponse(encoded.body, headers=headers)


async def infer(dataplane: DataPlane, codec: HttpCodec, request: HttpRequest) -> HttpResponse:
    """Answer an inference request for the model that the path names. Raises ServingError."""
    timings = current_timings()
    return await run_inference(dataplane, codec, HttpIncomingRequest(request, codec, timings), timings)
