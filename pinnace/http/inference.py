"""Inference over HTTP: read the body, run the inference, respond. V1 and V2 differ only in their codec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from pinnace.http.request import cancel_on_disconnect, read_body
from pinnace.inference.codec import Codec, EncodedRequest
from pinnace.inference.dataplane import DataPlane, run_inference
from pinnace.observability.timings import current_timings


class HttpCodec(Codec, Protocol):
    """A codec that knows from its headers whether it can decode a request."""

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Raise UnsupportedMediaType if the body, which is not read yet, is not one that `decode` takes."""


async def infer(request: HttpRequest, dataplane: DataPlane, codec: HttpCodec) -> HttpResponse:
    """Answer an inference request for the model that the path names. Raises ServingError."""
    name, headers, timings = request.path_params["model"], dict(request.headers), current_timings()

    async def read() -> EncodedRequest:
        dataplane.check_capacity(name)  # a request that would be refused is refused before its body is read
        codec.check_headers(headers)
        with timings.measure_stage("read"):
            body = await read_body(request)
        return EncodedRequest(name, body, headers)

    response = await run_inference(dataplane, codec, read, cancel_on_disconnect(request))
    return HttpResponse(response.body, headers={**response.headers, "server-timing": timings.server_timing})
