"""KServe's own clients against the server: what its tutorial and its end-to-end tests send."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import CAT, TUTORIAL_REQUEST, v1_request
from tests.servers import PROJECT, Server

SDK_PYTHON = PROJECT / ".venv-kserve/bin/python"


@pytest.fixture(scope="module")
def request_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's own request where it lies beside the project, else one with another picture."""
    if TUTORIAL_REQUEST.exists():
        return TUTORIAL_REQUEST
    file = tmp_path_factory.mktemp("request") / "input.json"
    file.write_text(v1_request(CAT))
    return file


@pytest.fixture(scope="module")
def answers(server: Server, request_file: Path) -> Any:
    if not SDK_PYTHON.exists():
        pytest.skip("KServe's SDK is not installed in .venv-kserve: `make test` does it")
    done = subprocess.run(
        [SDK_PYTHON, "tests/kserve_sdk/ask.py", server.url, server.grpc_address, str(request_file)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rest_answer(server: Server, request_file: Path) -> Any:
    return server.predict(request_file.read_bytes()).json()


@pytest.mark.parametrize("name", ["shape [1]", "no shape"])
def test_the_sdks_grpc_client_gets_the_values_that_rest_gives(name: str, answers: Any, rest_answer: Any) -> None:
    (output,) = answers[name]["outputs"]

    assert (output["name"], output["shape"], output["datatype"]) == ("output-0", [1, 5], "FP32")
    assert [output["data"]] == rest_answer["predictions"]
    assert answers[name]["model_name"] == "custom-model"


@pytest.mark.parametrize("name", ["typed", "raw"])
def test_the_sdks_grpc_client_gets_a_row_for_each_of_four_tensors(name: str, answers: Any) -> None:
    (output,) = answers[name]["outputs"]

    assert output["shape"] == [4, 5]
    assert len(set(output["data"])) == 20


def test_the_sdk_gets_the_same_from_typed_and_raw_tensors(answers: Any) -> None:
    assert answers["typed"]["outputs"] == answers["raw"]["outputs"]


def test_the_sdks_rest_client_gets_the_predictions(answers: Any, rest_answer: Any) -> None:
    assert answers["v1"] == rest_answer


@pytest.mark.parametrize("name", ["live", "ready", "model ready", "v1 live", "v1 model ready"])
def test_the_sdk_sees_the_server_alive_and_ready(name: str, answers: Any) -> None:
    assert answers[name] is True
