"""clients/: their output, and the one line that they print when something fails."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image, ImageChops

from examples.draw import draw
from tests.support.certificates import make_identity
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT, MODES
from tests.support.servers import PROJECT, Server, run_gated_server, run_server


def run_client(*arguments: str, port: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=PROJECT,
        env={**os.environ, "INGRESS_HOST": "127.0.0.1", "INGRESS_PORT": str(port), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


BOTH_CLIENTS = pytest.mark.parametrize("name", ["rest_client", "grpc_client"])


def get_port(server: Server, name: str) -> int:
    return server.http_port if name == "rest_client" else server.grpc_port


def get_expected_classes(server: Server, picture: bytes) -> list[tuple[str, float]]:
    request = {**json.loads(make_v1_request(picture)), "signature_name": "classification"}
    (row,) = server.predict(json.dumps(request)).json()["predictions"]
    return [(found["label"], found["probability"]) for found in row]


@BOTH_CLIENTS
def test_a_client_prints_the_labels_and_the_time_of_each_picture(name: str, server: Server, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(CAT)

    done = run_client(f"clients.{name}", f"{tmp_path}/*.png", port=get_port(server, name))

    lines = done.stdout.splitlines()
    assert [re.sub(r"\d+ ms$", "", line) for line in lines[::6]] == [
        f"{tmp_path}/{number}.png  " for number in range(3)
    ]
    assert lines[1:6] == [f"  {probability:6.1%}  {label}" for label, probability in get_expected_classes(server, CAT)]
    assert re.fullmatch(r"3 pictures in [\d.]+ s, [\d.]+ a second, 0 failed\n", done.stderr)


@BOTH_CLIENTS
@pytest.mark.parametrize("kind", ["V1 request", "V2 request", "URL"])
def test_a_client_reads_requests_of_either_protocol_and_urls(
    name: str, kind: str, server: Server, tmp_path: Path
) -> None:
    request = json.loads(make_v1_request(CAT))
    if kind == "V2 request":
        text = request["instances"][0]["image"]["b64"]
        request = {"inputs": [{"name": "input-0", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    (tmp_path / "input.json").write_text(json.dumps(request))
    (tmp_path / "cat.png").write_bytes(CAT)
    with serve_files(tmp_path) as url:
        source = f"{url}/cat.png" if kind == "URL" else f"{tmp_path}/input.json"
        done = run_client(f"clients.{name}", source, "--format=json", port=get_port(server, name))

    (found,) = json.loads(done.stdout)
    assert found["picture"].startswith(source)
    classes = get_expected_classes(server, CAT)
    assert [entry["label"] for entry in found["classes"]] == [label for label, _ in classes]
    assert [entry["probability"] for entry in found["classes"]] == pytest.approx([share for _, share in classes])


@contextmanager
def serve_files(folder: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = Thread(target=files.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{files.server_port}"
        finally:
            files.shutdown()
            thread.join()


@BOTH_CLIENTS
def test_failures_are_reported_and_the_other_results_are_written(name: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "half.png").write_bytes(CAT[:200])
    pictures = [f"{tmp_path}/half.png", f"{tmp_path}/cat.png", "absent.jpg"]

    done = run_client(
        f"clients.{name}", *pictures, "--format=csv", f"--output={tmp_path}/found.csv", port=get_port(server, name)
    )

    problems = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(problems)) == (1, "", 3)
    assert problems[0].startswith(f"{name}: {tmp_path}/half.png: 127.0.0.1:{get_port(server, name)} answered ")
    assert problems[1] == f"{name}: absent.jpg: No such file or directory"
    assert problems[2].endswith(", 2 failed")
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert [row["picture"] for row in rows] == [f"{tmp_path}/cat.png"] * 5
    assert [row["label"] for row in rows] == [label for label, _ in get_expected_classes(server, CAT)]


@BOTH_CLIENTS
def test_a_client_sends_its_key_and_certificate(name: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    authority = make_identity(tmp_path, "authority", None)
    server_identity, client_identity = (make_identity(tmp_path, owner, authority) for owner in ("server", "client"))
    required = (f"--ssl_ca_certs={authority.certificate}", f"--api_key_file={tmp_path}/key")
    certificate = (f"--ssl_certfile={client_identity.certificate}", f"--ssl_keyfile={client_identity.key}")
    tls = (f"--ssl_certfile={server_identity.certificate}", f"--ssl_keyfile={server_identity.key}")
    with run_server(f"--model_dir={model_dir}", *tls, *required) as server:
        picture = (f"clients.{name}", "examples/picture.jpg")
        address = f"--address=localhost:{get_port(server, name)}"
        accepted = run_client(*picture, address, *required, *certificate)
        without_certificate = run_client(*picture, address, *required)
        without_key = run_client(*picture, address, required[0], *certificate)

    assert (accepted.returncode, len(accepted.stdout.splitlines())) == (0, 6)
    assert (without_certificate.returncode, len(without_certificate.stderr.splitlines())) == (1, 1)
    assert (without_key.returncode, "an API key is required" in without_key.stderr) == (1, True)


@BOTH_CLIENTS
def test_a_client_retries_when_the_server_is_overloaded(name: str, model_dir: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (4000, 4000)).save(tmp_path / f"{number}.jpg")  # large, so that the requests overlap

    with run_server(f"--model_dir={model_dir}", "--max_concurrent_requests=1") as server:
        done = run_client(f"clients.{name}", f"{tmp_path}/*.jpg", "--connections=3", port=get_port(server, name))
        assert 'outcome="rejected"' in server.get("/metrics").text

    assert (done.returncode, len(done.stdout.splitlines())) == (0, 18)


@BOTH_CLIENTS
def test_a_client_calls_the_model_and_the_host_of_the_environment(name: str, server: Server) -> None:
    done = run_client(
        f"clients.{name}",
        "examples/picture.jpg",
        port=get_port(server, name),
        MODEL_NAME="other",
        SERVICE_HOSTNAME="custom-model.example.com",
    )

    assert done.returncode == 1
    assert done.stderr.endswith(": Model with name other does not exist.\n")


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["clients.grpc_client", "absent.json"], 1, "grpc_client: absent.json: No such file or directory\n"),
        (["clients.grpc_client", "examples/picture.jpg"], 1, "grpc_client: examples/picture.jpg: 127.0.0.1:1 "),
        (["clients.rest_client", "examples/picture.jpg"], 1, "rest_client: examples/picture.jpg: 127.0.0.1:1 "),
        (["clients.rest_client", "a.jpg", "--ssl_ca_certs=none"], 2, "rest_client: --ssl_ca_certs=none is no file\n"),
        (["clients.rest_client", "a.jpg", "--timeout_seconds=0"], 2, "rest_client: --timeout_seconds must be more"),
        (["clients.make_input"], 2, "usage: make_input.py PICTURE [PICTURE …] > input.json\n"),
        (["clients.make_input", "absent.jpg"], 1, "make_input.py: absent.jpg: No such file or directory\n"),
    ],
)  # fmt: skip
def test_a_client_that_fails_prints_one_line(arguments: list[str], code: int, problem: str) -> None:
    done = run_client(*arguments)

    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert done.stderr.startswith(problem)


def test_a_port_that_does_not_speak_http_is_reported_in_one_line(server: Server) -> None:
    done = run_client("clients.rest_client", "examples/picture.jpg", port=server.grpc_port)

    assert done.returncode == 1
    assert done.stderr.endswith("does not speak HTTP: see --address\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_standard_output_is_not_reported_as_a_failed_picture(server: Server, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(CAT)
    command = [sys.executable, "-m", "clients.rest_client", f"--address=127.0.0.1:{server.http_port}"]

    with subprocess.Popen(
        [*command, f"{tmp_path}/*.png"], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reading:
        assert reading.stdout
        assert reading.stderr
        reading.stdout.readline()
        reading.stdout.close()
        assert (reading.stderr.read(), reading.wait(timeout=60)) == ("", 1)


def test_an_interrupt_ends_the_client(tmp_path: Path, make_gate: Callable[[str], Path]) -> None:
    held = make_gate("held")
    request = {"instances": [{"image": {"b64": base64.b64encode(b"held").decode()}}] * 50}
    (tmp_path / "input.json").write_text(json.dumps(request))
    with run_gated_server(tmp_path, "--max_asyncio_workers=1") as server:
        command = [sys.executable, "-m", "clients.rest_client", f"--address=127.0.0.1:{server.http_port}"]
        with subprocess.Popen(
            [*command, f"{tmp_path}/input.json"], cwd=PROJECT, stderr=subprocess.PIPE, text=True
        ) as cli:
            with held.open("wb"):
                cli.send_signal(signal.SIGINT)
            assert cli.wait(timeout=30) == 130
            assert cli.stderr
            assert "Traceback" not in cli.stderr.read()


def test_a_json_file_that_is_no_request_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"instances": [1]}')

    done = run_client("clients.grpc_client", f"{tmp_path}/odd.json")

    assert done.stderr == f"grpc_client: {tmp_path}/odd.json is no V1 or V2 request with pictures\n"


def test_make_input_writes_a_request_with_every_picture(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "grey.jpg").write_bytes(MODES["JPEG grey"])

    done = run_client("clients.make_input", f"{tmp_path}/cat.png", f"{tmp_path}/grey.jpg")

    assert json.loads(done.stdout) == json.loads(make_v1_request(CAT, MODES["JPEG grey"]))


def test_the_example_picture_is_what_draw_draws() -> None:
    with Image.open(PROJECT / "examples/picture.jpg") as picture:
        difference = np.asarray(ImageChops.difference(picture, draw()))

    assert difference.max() < 64  # what JPEG loses at the edges
    request = json.loads((PROJECT / "examples/input.json").read_text())
    assert request == json.loads(make_v1_request((PROJECT / "examples/picture.jpg").read_bytes()))
