"""pinnace/process/ray_app.py and deploy/ray: the same server behind Ray Serve's own proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.clients import make_v1_request
from tests.support.pictures import PHOTOGRAPHS
from tests.support.servers import PROJECT, Server
from tests.support.waiting import wait_for

SERVE = str(Path(sys.executable).with_name("serve"))
CONFIGURATION = PROJECT / "deploy/ray/serve.yaml"
PROXY = "http://127.0.0.1:8000"
START_SECONDS = 90
PICTURE = next(iter(PHOTOGRAPHS.values()))


@pytest.fixture(scope="module")
def environment(model_dir: Path) -> Mapping[str, str]:
    """Return the environment of a new local Ray with the exported model."""
    return os.environ | {"RAY_ADDRESS": "local", "PINNACE_MODEL_DIR": str(model_dir)}


@pytest.fixture(scope="module")
def proxy(environment: Mapping[str, str]) -> Iterator[httpx.Client]:
    """Run `serve run` with the configuration in deploy/ray."""
    command = [SERVE, "run", str(CONFIGURATION)]
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process, httpx.Client(base_url=PROXY, timeout=30) as client:  # fmt: skip

        def has_started() -> bool:
            assert process.poll() is None
            return is_ready(client)

        wait_for(has_started, "Ray Serve's proxy", START_SECONDS)
        yield client
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.ray
def test_rays_proxy_gives_the_answers_of_the_server(proxy: httpx.Client, server: Server) -> None:
    bodies = [make_v1_request(PICTURE), make_v1_request(b"\xff\xd8\xff"), "{"]
    from_proxy = [proxy.post("/v1/models/custom-model:predict", content=body) for body in bodies]
    from_server = [server.predict(body) for body in bodies]

    assert [(answer.status_code, answer.json()) for answer in from_proxy] == [
        (answer.status_code, answer.json()) for answer in from_server
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
    assert [deployment["name"] for deployment in application["deployments"]] == [
        deployment["name"] for deployment in shipped["deployments"]
    ]


def test_kuberay_gets_the_same_configuration_and_the_pinned_ray() -> None:
    resource: Mapping[str, Any] = yaml.safe_load((PROJECT / "deploy/ray/rayservice.yaml").read_text())["spec"]

    assert yaml.safe_load(resource["serveConfigV2"]) == yaml.safe_load(CONFIGURATION.read_text())
    pinned = (PROJECT / "requirements/ray.txt").read_text()
    assert f"ray[serve]=={resource['rayClusterConfig']['rayVersion']} " in pinned
