"""pinnace/ray_app.py and deploy/ray/: the same server on Ray Serve's own proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.pictures import PHOTOGRAPHS, v1_request
from tests.servers import PROJECT, Server

SERVE = str(Path(sys.executable).with_name("serve"))
CONFIGURATION = PROJECT / "deploy/ray/serve.yaml"
PROXY = "http://127.0.0.1:8000"
START_SECONDS = 90
PICTURE = next(iter(PHOTOGRAPHS.values()))


@pytest.fixture(scope="module")
def environment(model_dir: Path) -> Mapping[str, str]:
    """Of a Ray of its own, with the exported model."""
    return os.environ | {"RAY_ADDRESS": "local", "PINNACE_MODEL_DIR": str(model_dir)}


@pytest.fixture(scope="module")
def proxy(environment: Mapping[str, str]) -> Iterator[httpx.Client]:
    """`serve run` with the configuration that is shipped."""
    command = [SERVE, "run", str(CONFIGURATION)]
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process, httpx.Client(base_url=PROXY, timeout=30) as client:  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(client):
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield client
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.ray
def test_rays_proxy_answers_as_the_server_does(proxy: httpx.Client, server: Server) -> None:
    bodies = [v1_request(PICTURE), v1_request(b"\xff\xd8\xff"), "{"]
    there = [proxy.post("/v1/models/custom-model:predict", content=body) for body in bodies]
    here = [server.predict(body) for body in bodies]

    assert [(answer.status_code, answer.json()) for answer in there] == [
        (answer.status_code, answer.json()) for answer in here
    ]
    assert proxy.get("/v2/models/custom-model").json() == server.get("/v2/models/custom-model").json()


@pytest.mark.ray
def test_serve_build_writes_a_configuration_of_the_same_application(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    command = [SERVE, "build", "pinnace.process.ray_app:app", "--output-path", str(tmp_path / "serve.yaml")]
    subprocess.run(command, cwd=PROJECT, env=environment, timeout=60, check=True)

    (application,) = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"]
    (shipped,) = yaml.safe_load(CONFIGURATION.read_text())["applications"]
    assert application["import_path"] == shipped["import_path"]
    assert [one["name"] for one in application["deployments"]] == [one["name"] for one in shipped["deployments"]]


def test_kuberay_gets_the_same_configuration_and_the_pinned_ray() -> None:
    resource: Mapping[str, Any] = yaml.safe_load((PROJECT / "deploy/ray/rayservice.yaml").read_text())["spec"]

    assert yaml.safe_load(resource["serveConfigV2"]) == yaml.safe_load(CONFIGURATION.read_text())
    pinned = (PROJECT / "requirements-ray.txt").read_text()
    assert f"ray[serve]=={resource['rayClusterConfig']['rayVersion']} " in pinned
