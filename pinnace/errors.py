"""Every failure that somebody outside can meet, in two tables: what a client is answered, and how a start ends."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

MAX_TEXT_CHARACTERS = 300


class ServingError(Exception):
    """A failure with an answer for the client.

    `str(error)` is the public text: it says what is wrong and where, and never repeats the payload. A class's row of
    the table are its keywords: `grpc_status` is a name of grpc.StatusCode, `outcome` what the metrics count it as, and
    `retry` says whether the same request may succeed later: after `retry_after_seconds`, by what is known then.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    outcome: ClassVar[str] = "failed"
    retry: ClassVar[bool] = False
    retry_after_seconds: float = 1.0

    def __init_subclass__(cls, **row: int | str | bool) -> None:
        for name, value in row.items():
            setattr(cls, name, value)

    def __init__(self, text: str) -> None:
        super().__init__(text[:MAX_TEXT_CHARACTERS])  # a name in it may be the client's, and of any length

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes: the text has been made already."""
        return copyreg.__newobj__, (type(self), str(self)), self.__dict__  # type: ignore[attr-defined]


class InvalidInput(ServingError, http_status=400, grpc_status="INVALID_ARGUMENT", outcome="invalid"):
    """The request cannot be answered as it is. Raised by transports, tensors, image and predictors."""


class Unauthenticated(ServingError, http_status=401, grpc_status="UNAUTHENTICATED", outcome="invalid"):
    """The client has not shown what lets it in. Raised by credentials."""


class ModelNotFound(ServingError, http_status=404, grpc_status="NOT_FOUND", outcome="invalid"):
    """No model of that name is served. Raised by repository."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} does not exist.")


class TooLarge(ServingError, http_status=413, grpc_status="RESOURCE_EXHAUSTED", outcome="invalid"):
    """A limit on sizes is exceeded; the text names the limit. Raised by whoever counts."""


class RequestTimeout(ServingError, http_status=408, grpc_status="DEADLINE_EXCEEDED", outcome="invalid"):
    """The body, or message, did not come to its end in time. Raised by rest_guard and both gRPC servers."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the request did not come within read_timeout_seconds ({seconds})")


class HeadersTooLarge(ServingError, http_status=431, grpc_status="RESOURCE_EXHAUSTED", outcome="invalid"):
    """The request line and its headers are more than is read. Raised by rest_guard."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"the request line and headers exceed {most_bytes} bytes")


class UnsupportedMediaType(ServingError, http_status=415, grpc_status="INVALID_ARGUMENT", outcome="invalid"):
    """The body's content type or encoding is not one that is read. Raised by the REST transports."""


class ClientDisconnected(ServingError, http_status=499, grpc_status="CANCELLED", outcome="cancelled"):
    """The client went before it was answered; nobody hears the answer. Raised by the REST transports."""

    def __init__(self) -> None:
        super().__init__("the client left")


class InternalError(ServingError, http_status=500, grpc_status="INTERNAL", outcome="failed"):
    """Something of ours, or of the predictor's, is broken: the log has it, the client does not. From logs.public."""

    def __init__(self) -> None:
        super().__init__("Internal server error")


class NotSupported(ServingError, http_status=501, grpc_status="UNIMPLEMENTED", outcome="invalid"):
    """Part of the protocol that this server, or this model, does not have. Raised by transports."""


class ModelNotReady(ServingError, http_status=503, grpc_status="UNAVAILABLE", outcome="rejected", retry=True):
    """The model exists but would not answer now. Raised by models."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} is not ready.")


class DeadlineExceeded(ServingError, http_status=504, grpc_status="DEADLINE_EXCEEDED", outcome="late", retry=True):
    """The answer would come later than --request_timeout_seconds allows. Raised by dataplane."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"The request was not answered within request_timeout_seconds ({seconds}); try again.")


class ReplicaLost(ServingError, http_status=503, grpc_status="UNAVAILABLE", outcome="rejected", retry=True):
    """What the model runs on went away with the request in it. Raised by ray_engine."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} lost the replica that was to answer; try again.")


class LoadFailed(ServingError, http_status=503, grpc_status="FAILED_PRECONDITION", outcome="failed"):
    """The model cannot be loaded: the log says why, the client is not told. Raised by repository.

    KServe's client would repeat the load on UNAVAILABLE.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} could not be loaded: the server's log says why.")


class Overloaded(ServingError, http_status=503, grpc_status="UNAVAILABLE", outcome="rejected", retry=True):
    """As much is under way as is allowed at once. Raised by admission and repository."""

    def __init__(self, limit: str, seconds: float = 1.0) -> None:
        super().__init__(f"The server is at its limit of {limit}; try again.")
        self.retry_after_seconds = seconds


def one_line(text: object) -> str:
    """An exception, or somebody else's text, for a line of ours: libraries write whole paragraphs."""
    return " ".join(str(text).split())


class StartupError(Exception):
    """The server cannot start, or not go on: `str(error)` is the one line that says what to do."""

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, exit_code: int = 1) -> None:
        cls.exit_code = exit_code


class ConfigurationError(StartupError, exit_code=2):
    """A flag is unknown, or it or its environment variable is out of range."""


class PortInUse(StartupError, exit_code=3):
    """A port cannot be listened on."""


class ModelFileNotFound(StartupError, exit_code=4):
    """No model is where it was looked for."""


class ModelLoadError(StartupError, exit_code=5):
    """The model is there and cannot be loaded."""


class DeviceUnavailable(StartupError, exit_code=6):
    """The device that was demanded cannot be had."""


class PredictorError(StartupError, exit_code=7):
    """--predictor cannot be imported, or fails to load its model."""


class PackageMissing(StartupError, exit_code=12):
    """A package that an extra brings is not installed."""


class RayUnavailable(StartupError, exit_code=10):
    """--engine=ray, but Ray cannot be had, or cannot run the model."""


class RayHeadLost(StartupError, exit_code=11):
    """Ray's head went away; what was accepted has been answered."""


class ShutdownTimeout(StartupError, exit_code=8):
    """The grace period ended, or a second signal came, before the last accepted request was answered."""


class DownloadError(StartupError, exit_code=9):
    """The model cannot be downloaded from --storage_uri, or is not what its checksums say."""
