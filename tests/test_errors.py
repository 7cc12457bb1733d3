"""pinnace/errors.py: every error, raised in a running server, and its answer over each transport."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from types import ModuleType

import grpc
import pytest

from pinnace import errors
from pinnace.errors import InternalError, ServingError, StartupError
from tests.support.clients import call_grpc
from tests.support.servers import Server, run_server

TABLE = [ServingError, *ServingError.__subclasses__()]
PYTHONS_OWN = ["RuntimeError", "KeyError", "StopIteration", "MemoryError", "AssertionError"]


@pytest.fixture(scope="module")
def failing() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Failing") as server:
        yield server


def get_public_text(error_class: type[ServingError]) -> str:
    return str(error_class("the secret of the text") if inspect.signature(error_class).parameters else error_class())  # type: ignore[call-arg]


@pytest.mark.parametrize("error_class", TABLE)
def test_rest_answers_an_error_with_its_status_and_text(error_class: type[ServingError], failing: Server) -> None:
    response = failing.predict(json.dumps({"instances": [error_class.__name__]}))

    assert response.status_code == error_class.http_status
    assert response.json() == {"error": get_public_text(error_class)}
    assert response.headers["content-type"] == "application/json"
    assert response.headers.get("retry-after") == ("1" if error_class.retry else None)


@pytest.mark.parametrize("error_class", TABLE)
def test_grpc_answers_an_error_with_its_status_and_text(
    error_class: type[ServingError], failing: Server, google: ModuleType
) -> None:
    status, text = infer_with_error(failing, google, error_class.__name__)

    assert (status.name, text) == (error_class.grpc_status, get_public_text(error_class))


@pytest.mark.parametrize("name", PYTHONS_OWN)
def test_an_unexpected_exception_is_an_internal_error_without_its_text(
    name: str, failing: Server, google: ModuleType
) -> None:
    response = failing.predict(json.dumps({"instances": [name]}))

    assert (response.status_code, response.json()) == (500, {"error": "Internal server error"})
    assert infer_with_error(failing, google, name) == (grpc.StatusCode.INTERNAL, "Internal server error")


def test_an_unexpected_exception_is_logged_with_its_traceback() -> None:
    with run_server("--predictor=tests.support.predictors:Failing") as server:
        server.predict(json.dumps({"instances": ["RuntimeError"]}))
        server.stop()

    assert [line for line in server.log if "request N.A. failed" in line]
    assert "RuntimeError: the secret of the text\n" in server.log


def test_an_error_text_is_truncated_to_300_characters(failing: Server) -> None:
    response = failing.post(f"/v1/models/{'x' * 5000}:predict", "{}")

    assert response.status_code == 404
    assert response.json()["error"].startswith("Model with name xxx")
    assert len(response.json()["error"]) == 300


def test_every_startup_error_has_an_exit_code_of_its_own() -> None:
    codes = [error_class.exit_code for error_class in StartupError.__subclasses__()]

    assert sorted(codes) == list(range(2, 2 + len(codes)))


def test_every_error_has_a_docstring() -> None:
    error_classes = [
        error_class
        for error_class in vars(errors).values()
        if isinstance(error_class, type) and issubclass(error_class, Exception)
    ]

    assert all(error_class.__doc__ for error_class in error_classes)
    assert InternalError in error_classes


def infer_with_error(server: Server, google: ModuleType, instance: str) -> tuple[grpc.StatusCode, str | None]:
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(instance.encode())
    with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as error:
        call_grpc(channel, google, "ModelInfer", request)
    return error.value.code(), error.value.details()
