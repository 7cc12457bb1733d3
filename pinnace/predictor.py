"""What a model has to do to be served: the four handlers, and the requests and responses that they see.

A predictor of your own is a subclass, named by --predictor module:Class. `pinnace.models.classifier` is the one for images.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pinnace.errors import InvalidInput
from pinnace.settings import Settings
from pinnace.tensors import Tensor, TensorSpec

Arrays = Mapping[str, NDArray[Any]]
"""Named arrays whose first axis is the rows: as many in each, one an instance of the request."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names; `parameters` are the protocol's, such as Triton's classification."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One inference request, whichever protocol it came by.

    `outputs` is empty where the client leaves the choice to the model. `instances` is their number in a V1 request,
    whose inputs are columns of the same instances; elsewhere 0. `headers` are HTTP's or gRPC's metadata, in lower
    case. `started_at` is a time.perf_counter().
    """

    model_name: str
    inputs: tuple[Tensor, ...]
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    instances: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=time.perf_counter)

    def count_rows(self, inputs: Sequence[TensorSpec]) -> int:
        """How many rows a model of these inputs gets; where they are several, each has all of the rows."""
        rows = [tensor.rows for tensor in self.inputs]
        return self.instances or (max(rows, default=0) if len(inputs) > 1 else sum(rows))

    @property
    def input(self) -> Tensor:
        """The one input of a model that takes one. Raises InvalidInput."""
        if len(self.inputs) != 1:
            raise InvalidInput(f"the model takes one input, not {len(self.inputs)}")
        return self.inputs[0]


@dataclass(frozen=True, slots=True)
class Response:
    """What the predictor answers; the dataplane adds the name and the id, and drops outputs that were not requested.

    `headers` are sent with a REST response.
    """

    outputs: Sequence[Tensor]
    headers: Mapping[str, str] = field(default_factory=dict)
    model_name: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What clients are told of a predictor, loaded or not: its class attributes of the same names."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    platform: str
    warning: str
    properties: Mapping[str, str]
    example: Sequence[Any]

    @classmethod
    def of(cls, predictor: Predictor | type[Predictor]) -> ModelMetadata:
        return cls(*(getattr(predictor, entry.name) for entry in fields(cls)))


class Predictor(ABC):
    """Loaded once, before the server is ready; then called from threads, never on the event loop.

    `preprocess` and `postprocess` run for several requests at once, `predict` for one batch at a time. Any of them
    may raise a ServingError for the client; any other exception is logged and answered as an internal error.
    """

    inputs: Sequence[TensorSpec] = ()
    outputs: Sequence[TensorSpec] = ()
    platform = ""
    warning = ""
    """Shown at every start and in the model's metadata, where not empty."""
    properties: Mapping[str, str] = {}
    """Facts for the V2 metadata and the page, by their names: what weights, what precision."""
    uses_all_cores = False
    """Whether `predict` keeps all CPU cores busy: then the next requests are decoded before or after it."""
    example: Sequence[Any] = ()
    """Instances of a V1 request that would be answered, for the documentation of the API."""

    def __init__(self, settings: Settings, model_dir: Path | None) -> None:
        """`model_dir` is --model_dir, or where a model was found; it may be a file. None where there is none."""
        self.settings = settings
        self.model_dir = model_dir

    def load(self) -> None:  # noqa: B027 a model may have nothing to load
        """Make ready to predict; raise StartError, or anything, to stop the start."""

    @abstractmethod
    def preprocess(self, request: Request) -> Arrays:
        """One request to its rows."""

    @abstractmethod
    def predict(self, rows: Arrays) -> Arrays:
        """The rows of a batch to the predictions for them, as many and in the same order."""

    @abstractmethod
    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        """The predictions for one request's rows to its response."""
