"""clients/: what they print, and the one line that they end with when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from examples.draw import draw
from tests.pictures import CAT, MODES, v1_request
from tests.servers import PROJECT, Server


def client(*arguments: str, port: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=PROJECT,
        env={**os.environ, "INGRESS_HOST": "127.0.0.1", "INGRESS_PORT": str(port), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", ["V1 request", "V2 request", "picture"])
def test_the_grpc_client_reads_a_picture_and_either_protocols_request(
    kind: str, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / ("photo.png" if kind == "picture" else "input.json")
    request = json.loads(v1_request(CAT))
    if kind == "V2 request":
        text = request["instances"][0]["image"]["b64"]
        request = {"inputs": [{"name": "input-0", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    file.write_bytes(CAT if kind == "picture" else json.dumps(request).encode())

    done = client("clients.grpc_client", str(file), port=server.grpc_port)

    expected = server.predict(v1_request(CAT)).json()["predictions"][0]
    assert done.stdout.splitlines()[1] == f"output-0 FP32 [1, 5] {expected}"


def test_the_grpc_client_calls_the_model_and_the_host_of_the_environment(server: Server) -> None:
    done = client(
        "clients.grpc_client",
        "examples/picture.jpg",
        port=server.grpc_port,
        MODEL_NAME="other",
        SERVICE_HOSTNAME="custom-model.example.com",
    )

    assert done.returncode == 1
    assert done.stderr == (
        f"grpc_client: 127.0.0.1:{server.grpc_port} answered NOT_FOUND: Model with name other does not exist.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["clients.grpc_client"], 2, "usage: python -m clients.grpc_client PICTURE|input.json\n"),
        (["clients.grpc_client", "absent.jpg"], 1, "grpc_client: absent.jpg: No such file or directory\n"),
        (["clients.grpc_client", "examples/picture.jpg"], 1, "grpc_client: 127.0.0.1:1 answered UNAVAILABLE: "),
        (["clients.make_input"], 2, "usage: make_input.py PICTURE [PICTURE …] > input.json\n"),
        (["clients.make_input", "absent.jpg"], 1, "make_input.py: absent.jpg: No such file or directory\n"),
    ],
)
def test_a_client_that_cannot_do_its_work_ends_with_one_line(arguments: list[str], code: int, problem: str) -> None:
    done = client(*arguments)

    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert done.stderr.startswith(problem)


def test_a_file_that_is_no_request_is_told_from_one(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"instances": [1]}')

    done = client("clients.grpc_client", f"{tmp_path}/odd.json")

    assert done.stderr == f"grpc_client: {tmp_path}/odd.json is neither a picture nor a V1 or V2 request in JSON\n"


def test_a_request_has_every_picture_that_was_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "grey.jpg").write_bytes(MODES["JPEG grey"])

    done = client("clients.make_input", f"{tmp_path}/cat.png", f"{tmp_path}/grey.jpg")

    assert json.loads(done.stdout) == json.loads(v1_request(CAT, MODES["JPEG grey"]))


def test_the_example_is_what_its_script_draws() -> None:
    with Image.open(PROJECT / "examples/picture.jpg") as picture:
        difference = np.asarray(ImageChops.difference(picture, draw()))

    assert difference.max() < 64  # what JPEG loses at the edges
    request = json.loads((PROJECT / "examples/input.json").read_text())
    assert request == json.loads(v1_request((PROJECT / "examples/picture.jpg").read_bytes()))
