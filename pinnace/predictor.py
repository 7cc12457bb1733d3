"""The predictor interface: what a model must implement to be served, and the requests and responses that it sees.

To serve a model of your own, subclass `Predictor` and name the class with `--predictor module:Class`. The predictor for
image classifiers, `pinnace.models.classifier`, is an example to read.

The protocols behind it:

- Open Inference Protocol (V2), REST and gRPC:
  https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
- KServe V1: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol
- Triton's extensions for classification and binary tensors:
  https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pinnace.errors import Abandoned, InvalidInput
from pinnace.settings import Settings
from pinnace.tensors import Tensor, TensorSpec

Arrays = Mapping[str, NDArray[Any]]
"""Numpy arrays by name. All have the same first dimension, which is the number of rows."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the client requested by name.

    `parameters` are those of the protocol, for example {"classification": 3} of Triton's classification extension.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class PreprocessCost:
    """An upper estimate of what `preprocess` needs for one request."""

    memory_bytes: int = 0
    """The peak of the memory that `preprocess` allocates, the arrays that it returns included."""
    cpu_seconds: float = 0.0
    """CPU time, of one core."""


@dataclass(frozen=True, slots=True)
class Request:
    """One inference request, the same for every protocol."""

    model_name: str
    inputs: tuple[Tensor, ...]
    """V2, gRPC: the tensors of the request. V1: a tensor named `instances`; one per key if instances are objects."""
    id: str = ""
    """The client's id for the request; a new UUID if it sent none."""
    outputs: tuple[RequestedOutput, ...] = ()
    """The requested outputs; empty if the client leaves the choice to the model."""
    num_instances: int = 0
    """V1: the number of instances. V2 and gRPC: 0."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers or gRPC metadata; names are in lower case."""
    started_at: float = field(default_factory=time.perf_counter)
    """When the request was decoded, on the clock of time.perf_counter, in seconds."""
    response_format: Any = None
    """How the response is to be encoded. Only the codec that decoded the request reads it."""
    is_abandoned: Callable[[], bool] = _never
    """Returns whether nobody waits for the response any more: the client disconnected, or the deadline passed."""

    def count_rows(self, inputs: Sequence[TensorSpec]) -> int:
        """Return the number of rows for a model with these inputs.

        A model of several inputs receives all rows in each of its inputs; a model of one input may receive the rows in
        several tensors.
        """
        if self.num_instances:
            return self.num_instances
        rows = [tensor.num_rows for tensor in self.inputs]
        return max(rows, default=0) if len(inputs) > 1 else sum(rows)

    def check_abandoned(self) -> None:
        """Raise Abandoned if nobody waits for the response any more.

        A handler that takes long, such as one that decodes many images, should call this between two of them.
        """
        if self.is_abandoned():
            raise Abandoned

    @property
    def input(self) -> Tensor:
        """Return the tensor of a request that has exactly one. Raises InvalidInput if it has none or several."""
        if len(self.inputs) != 1:
            raise InvalidInput(f"the model takes one input, not {len(self.inputs)}")
        return self.inputs[0]


@dataclass(frozen=True, slots=True)
class Response:
    """The response of a predictor to one request.

    The server fills in `model_name` and `id`, and leaves out outputs that the client did not request.
    """

    outputs: Sequence[Tensor]
    """One tensor per output. Its first dimension is the number of rows of the request."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the HTTP response. gRPC does not send them."""
    model_name: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The facts about a model that clients may know: the class attributes of its predictor with the same names."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    platform: str
    warning: str
    properties: Mapping[str, str]
    example: Sequence[Any]

    @classmethod
    def of(cls, predictor: Predictor | type[Predictor]) -> ModelMetadata:
        """Return the metadata of a predictor, or of a class whose model is not loaded."""
        return cls(*(getattr(predictor, entry.name) for entry in fields(cls)))


class Predictor(ABC):
    """Base class for a model. Subclass it, and name the subclass with `--predictor module:Class`.

    The server creates one instance per model and calls `load` before it reports ready. Then it calls, for every
    request, `preprocess`; the rows of several requests are concatenated and passed to `predict` as one batch;
    `postprocess` turns each request's share of the predictions into its response. All of them run on worker threads,
    never on the event loop, so they may block.

    A batch can mix requests of different clients. It mixes only requests whose arrays agree in names, dtypes and all
    dimensions but the first, and it has at most `--max_batch_size` rows. `predict` must not depend on which rows are in
    the batch, nor on their order.

    A model whose `preprocess` takes much memory or time for a small request, as a decoder of images does, says so with
    `estimate_preprocess`. Nothing else keeps such requests from taking the memory and the threads of all others.

    What a handler may raise:

    - InvalidInput: the request is wrong. The client gets HTTP 400 or gRPC INVALID_ARGUMENT with the text of the
      exception.
    - any other ServingError (see `pinnace.errors`), such as TooLarge (413, RESOURCE_EXHAUSTED), NotSupported (501,
      UNIMPLEMENTED) or Overloaded (503, UNAVAILABLE): the client gets the status that the class declares, and the text.
    - anything else: the client gets 500 or INTERNAL without the text, which goes to the log.

    If `predict` fails for a batch of several requests, it is called again for each request alone, so that only the
    faulty request fails.

    Example:
        A model of four numbers per row:

            from pinnace import InvalidInput, OnnxSession, Predictor, Response, Tensor, TensorSpec

            class Iris(Predictor):
                inputs = [TensorSpec("X", "FP32", (-1, 4))]
                outputs = [TensorSpec("probabilities", "FP32", (-1, 3))]

                def load(self):
                    self.session = OnnxSession(self.model_dir, self.settings.device, self.settings.threads)

                def preprocess(self, request):
                    if request.input.shape[1:] != (4,):
                        raise InvalidInput("each row must have four numbers")
                    return {"X": request.input.array.astype("float32")}

                def predict(self, batch):
                    return self.session.run(batch)

                def postprocess(self, predictions, request):
                    return Response([Tensor("probabilities", predictions["probabilities"])])
    """

    inputs: Sequence[TensorSpec] = ()
    """The inputs, for the model's metadata. -1 is a dimension of any size; the first dimension is the rows."""
    outputs: Sequence[TensorSpec] = ()
    """The outputs, for the model's metadata. If given, a request for any other output gets 400 before `preprocess`."""
    platform = ""
    """The framework that runs the model, for the V2 metadata, for example `onnxruntime_onnx`."""
    warning = ""
    """A text that the log shows at every start, and clients see in the metadata; empty for none."""
    properties: Mapping[str, str] = {}
    """Facts about the model by name, such as its precision, for the V2 metadata and the page."""
    uses_all_cores = False
    """Whether `predict` keeps all CPU cores busy. Then requests are decoded between its runs, not beside them."""
    example: Sequence[Any] = ()
    """V1 instances that the model can answer, for the API documentation."""

    def __init__(self, settings: Settings, model_dir: Path | None) -> None:
        """Store the arguments. Heavy work belongs in `load`.

        Args:
            settings: The settings that the server was started with; `settings.model_name` is this model's name.
            model_dir: The value of --model_dir, or the place where a model was found: a directory or a file. None if
                there is no model on disk.
        """
        self.settings = settings
        self.model_dir = model_dir

    def load(self) -> None:  # noqa: B027 a model may have nothing to load
        """Load the model. Called once per instance, on one thread, before any other handler.

        Raises:
            StartupError: The start ends with this one line and its exit code. After any other exception it ends with
                code 7 and the exception's text. If several models are served, the others go on.
        """

    def estimate_preprocess(self, request: Request) -> PreprocessCost:
        """Return what `preprocess` will take for this request. May run in several threads at once.

        Override it if a small request can take much: `preprocess` is called only when that much memory is free under
        --max_decode_bytes, and a request that takes long never occupies every thread. The default says that it takes
        nothing. It must be quick itself: look at sizes, and leave the work to `preprocess`.

        Raises:
            InvalidInput: The client gets 400 or INVALID_ARGUMENT with this text.
            TooLarge: The client gets 413 or RESOURCE_EXHAUSTED with this text.
        """
        return PreprocessCost()

    @abstractmethod
    def preprocess(self, request: Request) -> Arrays:
        """Convert one request to arrays. May run in several threads at once.

        Args:
            request: The decoded request. BYTES tensors are object arrays of `bytes`. Numbers from V1 JSON are INT64,
                FP64 or BOOL, since JSON does not tell FP32 from FP64; V2 and gRPC tensors have the dtype that the
                client named. Arrays may be read-only views of the request's body: copy before you write to them.

        Returns:
            Arrays by name. All have the same first dimension, the number of rows, which is at least 1. Anything that
            `numpy.asarray` accepts is converted.

        Raises:
            InvalidInput: The client gets 400 or INVALID_ARGUMENT with this text.
        """

    @abstractmethod
    def predict(self, batch: Arrays) -> Arrays:
        """Predict for a batch of rows. Runs in one thread at a time per model.

        Args:
            batch: The arrays that `preprocess` returned for one or several requests, concatenated along the first axis:
                1 to --max_batch_size rows. A larger request is predicted in several calls.

        Returns:
            Arrays by name, each with one entry per row of the batch along the first axis, in the same order.
        """

    @abstractmethod
    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        """Convert the predictions for one request's rows to its response. Runs in one thread at a time.

        Args:
            predictions: The rows of the predictions that belong to this request, in the order of its rows.
            request: The request, as `preprocess` received it.

        Returns:
            The response. Outputs that the client did not request are left out by the server. Numbers are sent as they
            are; NaN and infinity become null in JSON, which has neither. A predictor for which they are an error raises
            InvalidInput here, as the classifier does: then only the request that caused them fails, not its batch.

        Raises:
            InvalidInput: The client gets 400 or INVALID_ARGUMENT with this text, for example for a parameter of a
                requested output.
        """
