"""The error table: every failure that a client or an operator can meet.

A `ServingError` is the response to one request; it has a status for REST and one for gRPC. A `StartupError` ends the
process; it has an exit code.
"""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

MAX_TEXT_CHARACTERS = 300


class ServingError(Exception):
    """Base class of the errors that a client gets as its response.

    `str(error)` is the text for the client: it says what is wrong and where, and never repeats the payload. Subclasses
    set the class attributes by keyword arguments in their class statement.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    """The name of a grpc.StatusCode."""
    outcome: ClassVar[str] = "failed"
    """The label under which the metrics count the request."""
    retry: ClassVar[bool] = False
    """Whether the same request may succeed later."""
    retry_after_seconds: float = 1.0
    """How long a client should wait before it retries."""

    def __init_subclass__(cls, **row: int | str | bool) -> None:
        for name, value in row.items():
            setattr(cls, name, value)

    def __init__(self, text: str) -> None:
        super().__init__(text[:MAX_TEXT_CHARACTERS])  # it may contain a name that the client chose, of any length

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the finished text rather than the arguments of `__init__`, which differ between subclasses."""
        return copyreg.__newobj__, (type(self), str(self)), self.__dict__  # type: ignore[attr-defined]


class InvalidInput(ServingError, http_status=400, grpc_status="INVALID_ARGUMENT", outcome="invalid"):
    """The request is invalid; the text says what is wrong, and names the field if there is one.

    Raised where a request is read, decoded or checked, and by predictors.
    """


class Unauthenticated(ServingError, http_status=401, grpc_status="UNAUTHENTICATED", outcome="invalid"):
    """The request lacks a valid API key or a client certificate. Raised by auth."""


class ModelNotFound(ServingError, http_status=404, grpc_status="NOT_FOUND", outcome="invalid"):
    """No model has the name in the request. Raised by inference.repository."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} does not exist.")


class TooLarge(ServingError, http_status=413, grpc_status="RESOURCE_EXHAUSTED", outcome="invalid"):
    """A limit on bytes, JSON values, pixels, instances or open gRPC calls is exceeded; the text says which.

    Raised by http, grpc.service, inference.admission, models.image and predictors.
    """


class RequestTimeout(ServingError, http_status=408, grpc_status="DEADLINE_EXCEEDED", outcome="invalid"):
    """The client did not send the whole request in time. Raised by http.limits, http.grpc_bridge and grpc.service."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the request was not received within read_timeout_seconds ({seconds})")


class HeadersTooLarge(ServingError, http_status=431, grpc_status="RESOURCE_EXHAUSTED", outcome="invalid"):
    """The request line and headers, or a call's metadata, exceed their size limit.

    Returned by http.limits, raised by grpc.service.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the request line and headers exceed {max_bytes} bytes")


class UnsupportedMediaType(ServingError, http_status=415, grpc_status="INVALID_ARGUMENT", outcome="invalid"):
    """The body's content type or encoding is not supported. Raised by http.request."""


class ClientDisconnected(ServingError, http_status=499, grpc_status="CANCELLED", outcome="cancelled"):
    """The client disconnected before it got its response. Raised by http.request; seen in logs and metrics only."""

    def __init__(self) -> None:
        super().__init__("the client disconnected")


class Abandoned(ServingError, http_status=499, grpc_status="CANCELLED", outcome="cancelled"):
    """Nobody waits for the response any more, so the rest of the work is skipped. No client ever sees it.

    Raised by predictor.Request.check_abandoned.
    """

    def __init__(self) -> None:
        super().__init__("nobody waits for the response any more")


class InternalError(ServingError, http_status=500, grpc_status="INTERNAL", outcome="failed"):
    """An unexpected exception in the server or a predictor, whose traceback is in the log.

    Returned by observability.logging.to_client_error.
    """

    def __init__(self) -> None:
        super().__init__("Internal server error")


class NotSupported(ServingError, http_status=501, grpc_status="UNIMPLEMENTED", outcome="invalid"):
    """The server does not support this part of the protocol, or a setting disables it.

    Raised by http and inference.repository.
    """


class ModelNotReady(ServingError, http_status=503, grpc_status="UNAVAILABLE", outcome="rejected", retry=True):
    """The model exists but is not loaded, or the server is stopping.

    Raised by http.repository, inference.repository, inference.local_model and runtimes.ray_model.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} is not ready.")


class DeadlineExceeded(ServingError, http_status=504, grpc_status="DEADLINE_EXCEEDED", outcome="timeout", retry=True):
    """The request was not answered within --request_timeout_seconds. Raised by inference.dataplane."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"The request was not answered within request_timeout_seconds ({seconds}); try again.")


class ReplicaLost(ServingError, http_status=503, grpc_status="UNAVAILABLE", outcome="rejected", retry=True):
    """The Ray replica that ran the request stopped before it answered. Raised by runtimes.ray_model."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} lost the replica that ran this request; try again.")


class LoadFailed(ServingError, http_status=503, grpc_status="FAILED_PRECONDITION", outcome="failed"):
    """The model that the client asked to load cannot be loaded; the log says why. Raised by inference.repository.

    The gRPC status is not UNAVAILABLE, because KServe's client would then repeat the load.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"Model with name {name} could not be loaded: the server's log says why.")


class Overloaded(ServingError, http_status=503, grpc_status="UNAVAILABLE", outcome="rejected", retry=True):
    """A limit on concurrent work is reached. Raised by inference.admission and inference.repository."""

    def __init__(self, limit: str, seconds: float = 1.0) -> None:
        super().__init__(f"The server is at its limit of {limit}; try again.")
        self.retry_after_seconds = seconds


def one_line(text: object) -> str:
    """Return the text, such as a library's exception, with its whitespace collapsed so that it fits one line."""
    return " ".join(str(text).split())


def escape_unprintable(text: str) -> str:
    r"""Return the text with characters that are not printable written as escapes, such as `\x1b` or `\n`.

    These are control characters, line and paragraph separators, lone surrogates, and characters that have no shape,
    such as those that change the direction of text. In a log they would split a line, or command a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class StartupError(Exception):
    """Base class of the errors that end the process. `str(error)` is one line that says what to do."""

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, exit_code: int = 1) -> None:
        cls.exit_code = exit_code


class ConfigurationError(StartupError, exit_code=2):
    """A flag is unknown, or its value, or that of its environment variable, is invalid, or open files are too few.

    Raised by process.flags and by the modules that apply the settings.
    """


class PortInUse(StartupError, exit_code=3):
    """The server cannot listen on one of its ports.

    Raised by process.sockets and grpc.server.
    """


class ModelFileNotFound(StartupError, exit_code=4):
    """The model files were not found.

    Raised by runtimes.onnx, models.storage and inference.local_model.
    """


class ModelLoadError(StartupError, exit_code=5):
    """The model files were found, but the model cannot be loaded.

    Raised by runtimes.onnx and models.classifier.
    """


class DeviceUnavailable(StartupError, exit_code=6):
    """The device that --device requires is not available.

    Raised by runtimes.onnx.
    """


class PredictorError(StartupError, exit_code=7):
    """The class that --predictor names cannot be imported, or it failed to load its model.

    Raised by models.loader and inference.local_model.
    """


class ShutdownTimeout(StartupError, exit_code=8):
    """The grace period ended, or a second signal came, before all requests in flight were answered.

    Raised by process.server.
    """


class DownloadError(StartupError, exit_code=9):
    """The model cannot be downloaded from --storage_uri, or does not match its checksums.

    Raised by models.storage.
    """


class RayUnavailable(StartupError, exit_code=10):
    """Ray is not installed, cannot be started or joined, or cannot run the model.

    Raised by runtimes.ray_model.
    """


class RayHeadLost(StartupError, exit_code=11):
    """The connection to Ray's head was lost; the requests in flight were answered.

    Raised by runtimes.ray_model.
    """


class PackageMissing(StartupError, exit_code=12):
    """A package that the extra cpu, gpu, export or storage brings is not installed.

    Raised by runtimes.onnx, models.storage and process.cli.
    """
