"""Fixtures that several test modules share: an exported model, a server, gates, and google's messages."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import grpc
import pytest

from model_export.source import Source, load_source
from tests.support.servers import PROJECT, Server, run_server


@pytest.fixture(scope="session")
def export_output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Export AlexNet with weights of seed 0 as a user would. The folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, "-m", "model_export", "--weights", "seeded:0", "--output", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return folder, done.stdout


@pytest.fixture(scope="session")
def model_dir(export_output: tuple[Path, str]) -> Path:
    return export_output[0]


@pytest.fixture(scope="session")
def original() -> Source:
    """Load the torch model that `model_dir` was exported from."""
    return load_source("alexnet", "seeded:0")


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[Server]:
    with run_server(f"--model_dir={model_dir}") as server:
        yield server


@pytest.fixture(scope="session", params=["gRPC port", "HTTP port"])
def channel(request: pytest.FixtureRequest, server: Server) -> Iterator[grpc.Channel]:
    """Open a channel to either port: both must answer alike."""
    port = server.grpc_port if request.param == "gRPC port" else server.http_port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


@pytest.fixture
def make_gate(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a gate, a FIFO at which the gated predictors hold a request.

    Opening it for writing blocks until a request has reached it. Closing it lets the request continue.
    """

    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Generate google.protobuf's classes from our .proto files, as other people's clients use them."""
    folder = tmp_path_factory.mktemp("google")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROJECT}/proto", f"--python_out={folder}"]
    subprocess.run([*command, *(PROJECT / "proto").glob("*.proto")], cwd=PROJECT, check=True, timeout=60)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("grpc_predict_v2_pb2")
    finally:
        sys.path.remove(str(folder))
