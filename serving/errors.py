"""Every failure that somebody outside can meet, in two tables: what a client is answered, and how a start ends."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

LONGEST_TEXT_CHARACTERS = 300


class ServingError(Exception):
    """A failure with an answer for the client.

    `str(error)` is the public text: it says what is wrong and where, and never repeats the payload. `grpc_status`
    is a name of grpc.StatusCode. `outcome` is what the metrics count it as, and `retry` says whether the same request
    may succeed later: after `retry_after_seconds`, by what is known then.
    """

    http_status: ClassVar[int]
    grpc_status: ClassVar[str]
    outcome: ClassVar[str] = "invalid"
    retry: ClassVar[bool] = False
    retry_after_seconds: float = 1.0

    def __init__(self, text: str) -> None:
        super().__init__(text[:LONGEST_TEXT_CHARACTERS])  # a name in it may be the client's, and of any length

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes: the text has been made already."""
        return copyreg.__newobj__, (type(self), str(self)), self.__dict__  # type: ignore[attr-defined]


class InvalidInput(ServingError):
    """The request cannot be answered as it is. Raised by transports, tensors, image and predictors."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class Unauthenticated(ServingError):
    """The client has not shown what lets it in. Raised by credentials."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class ModelNotFound(ServingError):
    """No model of that name is served. Raised by repository."""

    http_status = 404
    grpc_status = "NOT_FOUND"

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} does not exist.")


class TooLarge(ServingError):
    """A limit on sizes is exceeded; the text names the limit. Raised by rest_guard, image and dataplane."""

    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class TooSlow(ServingError):
    """The body, or message, did not come to its end in time. Raised by rest_guard and grpc_over_http."""

    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the request did not come within read_timeout_seconds ({seconds})")


class HeadersTooLarge(ServingError):
    """The request line and its headers are more than is read. Raised by rest_guard."""

    http_status = 431
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"the request line and headers exceed {most_bytes} bytes")


class UnsupportedMediaType(ServingError):
    """The body's content type or encoding is not one that is read. Raised by the REST transports."""

    http_status = 415
    grpc_status = "INVALID_ARGUMENT"


class ClientLeft(ServingError):
    """The client went before it was answered; nobody hears the answer. Raised by the REST transports."""

    http_status = 499
    grpc_status = "CANCELLED"
    outcome = "cancelled"

    def __init__(self) -> None:
        super().__init__("the client left")


class InternalError(ServingError):
    """Something of ours, or of the predictor's, is broken: the log has it, the client does not. From logs.public."""

    http_status = 500
    grpc_status = "INTERNAL"
    outcome = "failed"

    def __init__(self) -> None:
        super().__init__("Internal server error")


class NotSupported(ServingError):
    """Part of the protocol that this server, or this model, does not have. Raised by transports."""

    http_status = 501
    grpc_status = "UNIMPLEMENTED"


class ModelNotReady(ServingError):
    """The model exists but would not answer now. Raised by models."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "rejected"
    retry = True

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} is not ready.")


class Late(ServingError):
    """The answer would come later than --request_timeout_seconds allows. Raised by dataplane."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    outcome = "late"
    retry = True

    def __init__(self, seconds: int) -> None:
        super().__init__(f"The request was not answered within request_timeout_seconds ({seconds}); try again.")


class ReplicaLost(ServingError):
    """What the model runs on went away with the request in it. Raised by ray_engine."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "rejected"
    retry = True

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} lost the replica that was to answer; try again.")


class LoadFailed(ServingError):
    """The model cannot be loaded: the log says why, the client is not told. Raised by repository."""

    http_status = 503
    grpc_status = "FAILED_PRECONDITION"  # KServe's client would repeat the load on UNAVAILABLE
    outcome = "failed"

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} could not be loaded: the server's log says why.")


class Overloaded(ServingError):
    """As much is under way as is allowed at once. Raised by admission and repository."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "rejected"
    retry = True

    def __init__(self, limit: str, seconds: float = 1.0) -> None:
        super().__init__(f"The server is at its limit of {limit}; try again.")
        self.retry_after_seconds = seconds


def one_line(text: object) -> str:
    """An exception, or somebody else's text, for a line of ours: libraries write whole paragraphs."""
    return " ".join(str(text).split())


class StartError(Exception):
    """The server cannot start, or not go on: `str(error)` is the one line that says what to do."""

    exit_code: ClassVar[int] = 1


class BadSetting(StartError):
    """A flag or environment variable is unknown or out of range."""

    exit_code = 2


class PortInUse(StartError):
    """A port cannot be listened on."""

    exit_code = 3


class ModelMissing(StartError):
    """No model is where it was looked for."""

    exit_code = 4


class ModelDamaged(StartError):
    """The model is there and cannot be loaded."""

    exit_code = 5


class DeviceMissing(StartError):
    """The device that was demanded cannot be had."""

    exit_code = 6


class PredictorBroken(StartError):
    """--predictor cannot be imported, or fails to load its model."""

    exit_code = 7


class EngineMissing(StartError):
    """--engine=ray, but Ray cannot be had, or cannot run the model."""

    exit_code = 10


class EngineLost(StartError):
    """Ray's head went away; what was accepted has been answered."""

    exit_code = 11


class DrainCut(StartError):
    """The grace period ended, or a second signal came, before the last accepted request was answered."""

    exit_code = 8


class DownloadFailed(StartError):
    """The model cannot be downloaded from --storage_uri, or is not what its checksums say."""

    exit_code = 9
