"""KServe's own clients against the server: the requests of its tutorial and its end-to-end tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import make_v1_request
from tests.support.pictures import CAT, TUTORIAL_REQUEST
from tests.support.servers import PROJECT, Server

SDK_PYTHON = PROJECT / ".venv-kserve/bin/python"


@pytest.fixture(scope="module")
def request_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tutorial's request where that file exists, else a request with another picture."""
    if TUTORIAL_REQUEST.exists():
        return TUTORIAL_REQUEST
    file = tmp_path_factory.mktemp("request") / "input.json"
    file.write_text(make_v1_request(CAT))
    return file


@pytest.fixture(scope="module")
def answers(server: Server, request_file: Path) -> Any:
    """Run the SDK's clients, and return the results of the gRPC client on either port and of the REST client."""
    if not SDK_PYTHON.exists():
        pytest.skip("KServe's SDK is not installed in .venv-kserve: `make test` does it")
    addresses = f"{server.grpc_address},127.0.0.1:{server.http_port}"
    done = subprocess.run(
        [SDK_PYTHON, "tests/kserve_sdk/call_server.py", server.url, addresses, str(request_file)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["gRPC port", "HTTP port"])
def grpc_answers(request: pytest.FixtureRequest, answers: Any) -> Any:
    return answers["grpc"][request.param == "HTTP port"]


@pytest.fixture(scope="module")
def rest_answer(server: Server, request_file: Path) -> Any:
    return server.predict(request_file.read_bytes()).json()


@pytest.mark.parametrize("name", ["shape [1]", "no shape"])
def test_the_sdks_grpc_client_gets_the_values_of_rest(name: str, grpc_answers: Any, rest_answer: Any) -> None:
    (output,) = grpc_answers[name]["outputs"]

    assert (output["name"], output["shape"], output["datatype"]) == ("output-0", [1, 5], "FP32")
    assert [output["data"]] == rest_answer["predictions"]
    assert grpc_answers[name]["model_name"] == "custom-model"


@pytest.mark.parametrize("name", ["typed", "raw"])
def test_the_sdks_grpc_client_gets_a_row_for_each_of_four_tensors(name: str, grpc_answers: Any) -> None:
    (output,) = grpc_answers[name]["outputs"]

    assert output["shape"] == [4, 5]
    assert len(set(output["data"])) == 20


def test_the_sdk_gets_the_same_values_for_typed_and_raw_tensors(grpc_answers: Any) -> None:
    assert grpc_answers["typed"]["outputs"] == grpc_answers["raw"]["outputs"]


@pytest.mark.parametrize("name", ["live", "ready", "model ready"])
def test_the_sdks_grpc_client_sees_the_server_alive_and_ready(name: str, grpc_answers: Any) -> None:
    assert grpc_answers[name] is True


def test_the_sdks_rest_client_gets_the_predictions(answers: Any, rest_answer: Any) -> None:
    assert answers["rest"]["v1"] == rest_answer


def test_the_sdks_rest_client_gets_v1s_values_from_v2(answers: Any, rest_answer: Any) -> None:
    answer = answers["rest"]["v2 image"]

    assert answer["id"] == "mine"
    assert [answer["outputs"][0]["data"]] == rest_answer["predictions"]


@pytest.mark.parametrize("name", ["v2 JSON", "v2 binary"])
def test_the_sdks_rest_client_gets_the_values_of_grpc_from_v2(name: str, answers: Any) -> None:
    (by_rest,), (by_grpc,) = answers["rest"][name]["outputs"], answers["grpc"][0]["typed"]["outputs"]

    assert (by_rest["name"], by_rest["shape"]) == ("output-0", [2, 5])
    assert by_rest["data"] == pytest.approx(by_grpc["data"][:10], abs=1e-5)


@pytest.mark.parametrize("name", ["v1 live", "v1 model ready", "v2 live", "v2 ready", "v2 model ready"])
def test_the_sdks_rest_client_sees_the_server_alive_and_ready(name: str, answers: Any) -> None:
    assert answers["rest"][name] is True
