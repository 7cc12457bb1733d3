"""One inference call: a request from its encoded form to its encoded response."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pinnace.errors import InvalidInput
from pinnace.inference.admission import Permit, check_max_rows
from pinnace.inference.codec import Codec, EncodedRequest, EncodedResponse
from pinnace.observability.timings import RequestTimings
from pinnace.predictor import Request, Response
from pinnace.settings import Settings
from pinnace.tensors import TensorSpec


@dataclass(eq=False, slots=True)
class InferenceCall:
    """One inference request on its way through the server. Each step adds its result.

    The event loop makes it and reads it again when the call has ended; in between only the worker thread that has the
    call uses it.
    """

    codec: Codec
    encoded: EncodedRequest
    timings: RequestTimings
    permit: Permit = field(default_factory=Permit)
    request: Request | None = None
    """The decoded request; None until it is decoded."""
    response: Response | None = None
    """The predictor's response; None until it is there."""

    def decode(self, inputs: Sequence[TensorSpec], settings: Settings) -> Request:
        """Decode the request, and count its rows for a model with these inputs.

        Raises:
            InvalidInput: The body is not a request, or the request has no rows.
            TooLarge: The request has more rows than the setting max_instances.
        """
        request = self.codec.decode(self.encoded)
        num_rows = request.count_rows(inputs)
        if not num_rows:
            raise InvalidInput("the request has no instances")
        check_max_rows(num_rows, settings)
        self.permit.num_rows = num_rows
        self.request = replace(request, id=request.id or str(uuid.uuid4()))
        return self.request

    def encode(self, response: Response, request: Request) -> EncodedResponse:
        """Encode the response to the decoded request. Raises what the codec raises."""
        self.response = response
        return self.codec.encode(response, request)
