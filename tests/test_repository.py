"""pinnace/inference/repository.py: loading and unloading of models over REST and gRPC."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import pytest

from pinnace.inference.repository import MAX_PENDING_CHANGES
from tests.support.clients import call_grpc, make_v1_request
from tests.support.pictures import CAT
from tests.support.servers import Server, run_gated_server, run_server

ENABLED = "--enable_model_repository=true"
FROM_FILE = "--predictor=tests.support.predictors:FromFile"
MIB = 1024 * 1024
FEW_OBJECTS = 10_000  # a server imports 50,000


class Client:
    """A client of the repository over one protocol. Its methods return an error as status and text."""

    def __init__(self, server: Server, google: ModuleType, protocol: str) -> None:
        self._server, self._google, self._protocol = server, google, protocol

    def load(self, model: str = "custom-model") -> Any:
        return self._change("Load", model)

    def unload(self, model: str = "custom-model") -> Any:
        return self._change("Unload", model)

    def index(self, only_ready: bool = False) -> Any:
        if self._protocol == "REST":
            answer = self._server.post("/v2/repository/index", json.dumps({"ready": True}) if only_ready else "")
            return answer.json() if answer.is_success else (answer.status_code, answer.json()["error"])
        answer = self._call("RepositoryIndex", ready=only_ready)
        if isinstance(answer, tuple):
            return answer
        return [{"name": m.name, "version": m.version, "state": m.state, "reason": m.reason} for m in answer.models]

    def _change(self, verb: str, model: str) -> Any:
        if self._protocol == "REST":
            answer = self._server.post(f"/v2/repository/models/{model}/{verb.lower()}", "")
            return answer.json() if answer.is_success else (answer.status_code, answer.json()["error"])
        answer = self._call(f"RepositoryModel{verb}", model_name=model)
        if isinstance(answer, tuple):
            return answer
        return {"name": answer.model_name, verb.lower(): getattr(answer, f"is{verb}ed")}

    def _call(self, method: str, **fields: Any) -> Any:
        try:
            with grpc.insecure_channel(self._server.grpc_address) as channel:
                return call_grpc(channel, self._google, method, getattr(self._google, f"{method}Request")(**fields))
        except grpc.RpcError as error:
            return error.code().name, error.details()


@pytest.fixture(params=["REST", "gRPC"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alexnet(model_dir: Path) -> Iterator[Server]:
    with run_server(ENABLED, f"--model_dir={model_dir}") as server:
        yield server


@pytest.fixture
def from_file(tmp_path: Path) -> Iterator[Server]:
    """Serve a model that answers with the text of its file."""
    (tmp_path / "model").write_text("first")
    with run_server(ENABLED, FROM_FILE, f"--model_dir={tmp_path}") as server:
        yield server


@pytest.fixture
def self_referencing(tmp_path: Path) -> Iterator[Server]:
    with run_server(
        ENABLED, "--predictor=tests.support.predictors:SelfReferencing", f"--model_dir={tmp_path}"
    ) as server:
        yield server


def read_memory_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def read_readiness(server: Server) -> tuple[int, int, int]:
    """Return the statuses of the readiness of the server, and of the model over V2 and V1."""
    paths = ("/v2/health/ready", "/v2/models/custom-model/ready", "/v1/models/custom-model")
    server_status, v2_status, v1_status = (server.get(path).status_code for path in paths)
    return server_status, v2_status, v1_status


def predict(server: Server) -> Any:
    return server.predict('{"instances": [1]}').json()["predictions"]


def test_without_the_flag_models_cannot_be_loaded_or_unloaded(
    protocol: str, server: Server, google: ModuleType
) -> None:
    client = Client(server, google, protocol)

    refused = (
        501 if protocol == "REST" else "UNIMPLEMENTED",
        "The model repository is off: see --enable_model_repository",
    )
    assert client.unload() == client.load() == client.index() == refused
    assert read_readiness(server) == (200, 200, 200)


def test_an_unloaded_model_is_not_ready_and_its_memory_is_freed(
    protocol: str, alexnet: Server, google: ModuleType
) -> None:
    client = Client(alexnet, google, protocol)
    before, held = alexnet.predict(make_v1_request(CAT)).json(), read_memory_bytes(alexnet)

    assert client.unload() == {"name": "custom-model", "unload": True}
    assert held - read_memory_bytes(alexnet) > 150 * MIB  # AlexNet has 244 MB of weights, copied for speed
    assert read_readiness(alexnet) == (503, 503, 503)
    refused = alexnet.predict(make_v1_request(CAT))
    assert (refused.status_code, refused.json()) == (503, {"error": "Model with name custom-model is not ready."})

    assert client.load() == {"name": "custom-model", "load": True}
    assert read_readiness(alexnet) == (200, 200, 200)
    assert alexnet.predict(make_v1_request(CAT)).json() == before


def test_an_unloaded_model_is_freed_even_if_it_refers_to_itself(
    self_referencing: Server, google: ModuleType, tmp_path: Path
) -> None:
    assert not (tmp_path / "freed").exists()

    Client(self_referencing, google, "REST").unload()

    assert (tmp_path / "freed").exists()


def test_garbage_collection_skips_the_objects_of_a_loaded_model(self_referencing: Server, google: ModuleType) -> None:
    client = Client(self_referencing, google, "REST")
    assert predict(self_referencing)[0] < FEW_OBJECTS

    client.unload()
    client.load()
    assert predict(self_referencing)[0] < FEW_OBJECTS


def test_an_unloaded_model_is_unavailable_over_grpc(from_file: Server, google: ModuleType) -> None:
    client = Client(from_file, google, "gRPC")
    client.unload()

    with grpc.insecure_channel(from_file.grpc_address) as channel:
        request = google.ModelReadyRequest(name="custom-model")
        assert not call_grpc(channel, google, "ModelReady", request).ready
        with pytest.raises(grpc.RpcError) as error:
            call_grpc(channel, google, "ModelInfer", google.ModelInferRequest(model_name="custom-model"))
    assert (error.value.code().name, error.value.details()) == (
        "UNAVAILABLE",
        "Model with name custom-model is not ready.",
    )


def test_the_index_lists_every_model_and_its_state(protocol: str, from_file: Server, google: ModuleType) -> None:
    client = Client(from_file, google, protocol)
    model = {"name": "custom-model", "version": "", "state": "READY", "reason": ""}

    assert client.index() == client.index(only_ready=True) == [model]
    client.unload()
    assert client.index() == [{**model, "state": "UNAVAILABLE"}]
    assert client.index(only_ready=True) == []


def test_loading_or_unloading_an_unknown_model_is_an_error(
    protocol: str, from_file: Server, google: ModuleType
) -> None:
    client = Client(from_file, google, protocol)

    missing = (404 if protocol == "REST" else "NOT_FOUND", "Model with name nope does not exist.")
    assert client.load("nope") == client.unload("nope") == missing


def test_a_load_reads_the_current_files_of_the_model(from_file: Server, google: ModuleType, tmp_path: Path) -> None:
    client = Client(from_file, google, "REST")
    (tmp_path / "model").write_text("second")

    client.load()
    assert predict(from_file) == ["first"]  # already loaded: nothing changes
    client.unload()
    client.load()
    assert predict(from_file) == ["second"]


def test_a_model_that_cannot_be_loaded_stays_unloaded_and_the_reason_is_logged(
    protocol: str, from_file: Server, google: ModuleType, tmp_path: Path
) -> None:
    client = Client(from_file, google, protocol)
    client.unload()
    (tmp_path / "model").rename(tmp_path / "elsewhere")

    text = "Model with name custom-model could not be loaded: the server's log says why."
    assert client.load() == (503 if protocol == "REST" else "FAILED_PRECONDITION", text)
    from_file.wait_for_line(re.compile("ERROR .* custom-model could not be loaded: FromFile .*No such file"))
    assert read_readiness(from_file) == (503, 503, 503)

    (tmp_path / "elsewhere").rename(tmp_path / "model")
    assert client.load() == {"name": "custom-model", "load": True}


def test_a_request_in_flight_is_answered_by_the_model_that_was_loaded_when_it_began(
    google: ModuleType, tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path, ENABLED) as server, ThreadPoolExecutor() as clients:
        answer = clients.submit(server.predict, '{"instances": ["held"]}')
        with held.open("wb"):
            Client(server, google, "REST").unload()

        assert answer.result().json() == {"predictions": ["held"]}


def test_the_server_answers_during_a_load_which_continues_when_its_client_disconnects(
    from_file: Server, tmp_path: Path, google: ModuleType
) -> None:
    client = Client(from_file, google, "REST")
    client.unload()
    (tmp_path / "model").unlink()
    os.mkfifo(tmp_path / "model")
    with ThreadPoolExecutor() as clients, httpx.Client(base_url=from_file.url) as leaving:
        abandoned = clients.submit(
            lambda: leaving.post("/v2/repository/models/custom-model/load", timeout=httpx.Timeout(30, read=0.5))
        )
        with (tmp_path / "model").open("w") as model:  # blocks until the load reads the file
            assert from_file.get("/v2/health/live").status_code == 200
            assert read_readiness(from_file) == (503, 503, 503)
            with pytest.raises(httpx.ReadTimeout):
                abandoned.result()
            model.write("late")
    from_file.wait_for_line(re.compile("custom-model is ready"))

    assert predict(from_file) == ["late"]


def test_a_load_that_never_ends_does_not_delay_the_stop(tmp_path: Path, google: ModuleType) -> None:
    (tmp_path / "model").write_text("first")
    with run_server(ENABLED, FROM_FILE, f"--model_dir={tmp_path}", "--grace_period_seconds=1") as server:
        Client(server, google, "REST").unload()
        (tmp_path / "model").unlink()
        os.mkfifo(tmp_path / "model")
        with server.connect() as client:
            client.sendall(b"POST /v2/repository/models/custom-model/load HTTP/1.1\r\nHost: x\r\n\r\n")
            with (tmp_path / "model").open("w"):  # blocks until the load reads the file
                assert server.stop() == 0


def test_loads_beyond_the_queue_are_refused(from_file: Server, tmp_path: Path, google: ModuleType) -> None:
    client = Client(from_file, google, "REST")
    client.unload()
    (tmp_path / "model").unlink()
    os.mkfifo(tmp_path / "model")
    with ThreadPoolExecutor(MAX_PENDING_CHANGES + 1) as clients:
        answers = [clients.submit(client.load) for _ in range(MAX_PENDING_CHANGES + 1)]
        with (tmp_path / "model").open("w"):
            refused = next(as_completed(answers, timeout=30))
            assert refused.result() == (503, "The server is at its limit of loads and unloads; try again.")
        assert sum(isinstance(answer.result(), dict) for answer in answers) == MAX_PENDING_CHANGES


def test_the_server_metadata_names_the_extension_when_it_is_enabled(from_file: Server, server: Server) -> None:
    assert "model_repository_extension" in from_file.get("/v2").json()["extensions"]
    assert "model_repository_extension" not in server.get("/v2").json()["extensions"]


def test_a_metric_shows_which_model_is_loaded(from_file: Server, google: ModuleType) -> None:
    assert 'pinnace_model_ready{model_name="custom-model"} 1.0' in from_file.get("/metrics").text
    Client(from_file, google, "REST").unload()
    assert 'pinnace_model_ready{model_name="custom-model"} 0.0' in from_file.get("/metrics").text
