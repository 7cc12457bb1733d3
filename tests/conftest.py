"""Fixtures that several test modules share: an exported model, a server, gates, and google's messages."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.support.servers import PROJECT, Server, run_server

if TYPE_CHECKING:
    from model_export.source import Source

MODEL_DIR_VARIABLE = "TEST_MODEL_DIR"  # a model that `--weights seeded:0` exported, for a Python without torch
TORCH_REASON = "compares with torch, which is not installed here"
SLOW = {"slow": ("`make test-all` runs it", 900), "ray": ("needs Ray: `make test-ray` runs it", 300)}


def pytest_configure() -> None:
    """Stop ignoring SIGINT and SIGHUP: a shell or nohup may ignore them, and what the tests start would too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the slow tests unless `-m` selects tests, and give them more time."""
    for item in items:
        for name, (reason, timeout_seconds) in SLOW.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.timeout(timeout_seconds))
                if not config.option.markexpr:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: {reason}"))


@pytest.fixture(scope="session")
def export_output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Export AlexNet with weights of seed 0 as a user would. The folder, and what the command printed."""
    pytest.importorskip("torch", reason=f"exports a model, which needs torch, and {MODEL_DIR_VARIABLE} is not set")
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, "-m", "model_export", "--weights", "seeded:0", "--output", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return folder, done.stdout


@pytest.fixture(scope="session")
def model_dir(request: pytest.FixtureRequest) -> Path:
    """Return the folder that TEST_MODEL_DIR names, or else export a model."""
    if given := os.environ.get(MODEL_DIR_VARIABLE):
        return Path(given).resolve()
    folder, _ = request.getfixturevalue("export_output")
    return Path(folder)


@pytest.fixture(scope="session")
def original() -> Source:
    """Load the torch model that `model_dir` was exported from."""
    pytest.importorskip("torch", reason=TORCH_REASON)
    from model_export.source import load_source

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
