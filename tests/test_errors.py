"""pinnace/errors.py: every row of the error table, raised in a running server, as each transport answers it."""

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


def public_text(kind: type[ServingError]) -> str:
    return str(kind("the secret of the text") if inspect.signature(kind).parameters else kind())  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", TABLE)
def test_rest_answers_an_error_with_its_status_and_text(kind: type[ServingError], failing: Server) -> None:
    response = failing.predict(json.dumps({"instances": [kind.__name__]}))

    assert response.status_code == kind.http_status
    assert response.json() == {"error": public_text(kind)}
    assert response.headers["content-type"] == "application/json"
    assert response.headers.get("retry-after") == ("1" if kind.retry else None)


@pytest.mark.parametrize("kind", TABLE)
def test_grpc_answers_an_error_with_its_status_and_text(
    kind: type[ServingError], failing: Server, google: ModuleType
) -> None:
    status, text = grpc_error(failing, google, kind.__name__)

    assert (status.name, text) == (kind.grpc_status, public_text(kind))


@pytest.mark.parametrize("name", PYTHONS_OWN)
def test_what_nobody_foresaw_is_logged_and_not_told(name: str, failing: Server, google: ModuleType) -> None:
    response = failing.predict(json.dumps({"instances": [name]}))

    assert (response.status_code, response.json()) == (500, {"error": "Internal server error"})
    assert grpc_error(failing, google, name) == (grpc.StatusCode.INTERNAL, "Internal server error")


def test_the_log_has_the_traceback_that_the_client_has_not() -> None:
    with run_server("--predictor=tests.support.predictors:Failing") as server:
        server.predict(json.dumps({"instances": ["RuntimeError"]}))
        server.stop()

    assert [line for line in server.log if "request N.A. failed" in line]
    assert "RuntimeError: the secret of the text\n" in server.log


def test_a_text_is_cut_where_a_clients_name_would_make_it_long(failing: Server) -> None:
    response = failing.post(f"/v1/models/{'x' * 5000}:predict", "{}")

    assert response.status_code == 404
    assert response.json()["error"].startswith("Model with name xxx")
    assert len(response.json()["error"]) == 300


def test_every_way_in_which_a_start_fails_has_an_exit_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in StartupError.__subclasses__()]

    assert sorted(codes) == list(range(2, 2 + len(codes)))


def test_every_error_says_who_raises_it_or_when() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]

    assert all(kind.__doc__ for kind in kinds)
    assert InternalError in kinds


def grpc_error(server: Server, google: ModuleType, instance: str) -> tuple[grpc.StatusCode, str | None]:
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(instance.encode())
    with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as error:
        call_grpc(channel, google, "ModelInfer", request)
    return error.value.code(), error.value.details()
