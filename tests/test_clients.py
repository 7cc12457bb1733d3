"""clients/: their output, their exit codes, and their error messages of one line."""

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


both_clients = pytest.mark.parametrize("name", ["rest_client", "grpc_client"])


def port_of(server: Server, name: str) -> int:
    return server.http_port if name == "rest_client" else server.grpc_port


def predict_classes(server: Server, picture: bytes) -> list[tuple[str, float]]:
    request = {**json.loads(make_v1_request(picture)), "signature_name": "classification"}
    (row,) = server.predict(json.dumps(request)).json()["predictions"]
    return [(entry["label"], entry["probability"]) for entry in row]


@both_clients
def test_a_client_prints_the_labels_and_the_time_of_each_picture(name: str, server: Server, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(CAT)

    done = run_client(f"clients.{name}", f"{tmp_path}/*.png", port=port_of(server, name))

    lines = done.stdout.splitlines()
    assert [re.sub(r"\d+ ms$", "", line) for line in lines[::6]] == [
        f"{tmp_path}/{number}.png  " for number in range(3)
    ]
    assert lines[1:6] == [f"  {probability:6.1%}  {label}" for label, probability in predict_classes(server, CAT)]
    assert re.fullmatch(r"3 pictures in [\d.]+ s, [\d.]+ per second, 0 failed\n", done.stderr)


@both_clients
@pytest.mark.parametrize("kind", ["V1 request", "V2 request", "URL"])
def test_a_client_reads_v1_requests_v2_requests_and_urls(name: str, kind: str, server: Server, tmp_path: Path) -> None:
    request = json.loads(make_v1_request(CAT))
    if kind == "V2 request":
        text = request["instances"][0]["image"]["b64"]
        request = {"inputs": [{"name": "input-0", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    (tmp_path / "input.json").write_text(json.dumps(request))
    (tmp_path / "cat.png").write_bytes(CAT)
    with serve_files(tmp_path) as url:
        source = f"{url}/cat.png" if kind == "URL" else f"{tmp_path}/input.json"
        done = run_client(f"clients.{name}", source, "--format=json", port=port_of(server, name))

    (result,) = json.loads(done.stdout)
    assert result["picture"].startswith(source)
    classes = predict_classes(server, CAT)
    assert [entry["label"] for entry in result["classes"]] == [label for label, _ in classes]
    probabilities = [entry["probability"] for entry in result["classes"]]
    assert probabilities == pytest.approx([probability for _, probability in classes])


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


@both_clients
def test_failed_pictures_are_reported_and_the_others_are_written(name: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "half.png").write_bytes(CAT[:200])
    pictures = [f"{tmp_path}/half.png", f"{tmp_path}/cat.png", "absent.jpg"]

    done = run_client(
        f"clients.{name}", *pictures, "--format=csv", f"--output={tmp_path}/results.csv", port=port_of(server, name)
    )

    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 3)
    assert lines[0].startswith(f"{name}: {tmp_path}/half.png: 127.0.0.1:{port_of(server, name)} answered ")
    assert lines[1] == f"{name}: absent.jpg: No such file or directory"
    assert lines[2].endswith(", 2 failed")
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["picture"] for row in rows] == [f"{tmp_path}/cat.png"] * 5
    assert [row["label"] for row in rows] == [label for label, _ in predict_classes(server, CAT)]


@both_clients
def test_a_client_sends_its_key_and_certificate(name: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    authority = make_identity(tmp_path, "authority", None)
    server_party, client_party = (make_identity(tmp_path, party, authority) for party in ("server", "client"))
    ca_and_key = (f"--ssl_ca_certs={authority.certificate}", f"--api_key_file={tmp_path}/key")
    client_certificate = (f"--ssl_certfile={client_party.certificate}", f"--ssl_keyfile={client_party.key}")
    server_certificate = (f"--ssl_certfile={server_party.certificate}", f"--ssl_keyfile={server_party.key}")
    with run_server(f"--model_dir={model_dir}", *server_certificate, *ca_and_key) as server:
        picture = (f"clients.{name}", "examples/picture.jpg")
        address = f"--address=localhost:{port_of(server, name)}"
        accepted = run_client(*picture, address, *ca_and_key, *client_certificate)
        without_certificate = run_client(*picture, address, *ca_and_key)
        without_key = run_client(*picture, address, ca_and_key[0], *client_certificate)

    assert (accepted.returncode, len(accepted.stdout.splitlines())) == (0, 6)
    assert (without_certificate.returncode, len(without_certificate.stderr.splitlines())) == (1, 1)
    assert (without_key.returncode, "an API key is required" in without_key.stderr) == (1, True)


@both_clients
def test_a_client_retries_when_the_server_is_busy(name: str, model_dir: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (4000, 4000)).save(tmp_path / f"{number}.jpg")  # large, so that each decode takes a while

    with run_server(f"--model_dir={model_dir}", "--max_concurrent_requests=1") as server:
        done = run_client(f"clients.{name}", f"{tmp_path}/*.jpg", "--connections=3", port=port_of(server, name))
        assert 'outcome="rejected"' in server.get("/metrics").text

    assert (done.returncode, len(done.stdout.splitlines())) == (0, 18)


@both_clients
def test_a_client_takes_the_model_and_the_host_from_the_environment(name: str, server: Server) -> None:
    done = run_client(
        f"clients.{name}",
        "examples/picture.jpg",
        port=port_of(server, name),
        MODEL_NAME="other",
        SERVICE_HOSTNAME="custom-model.example.com",
    )

    assert done.returncode == 1
    assert done.stderr.endswith(": Model with name other does not exist.\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["clients.grpc_client", "absent.json"], 1, "grpc_client: absent.json: No such file or directory\n"),
        (["clients.grpc_client", "examples/picture.jpg"], 1, "grpc_client: examples/picture.jpg: 127.0.0.1:1 "),
        (["clients.rest_client", "examples/picture.jpg"], 1, "rest_client: examples/picture.jpg: 127.0.0.1:1 "),
        (["clients.rest_client", "a.jpg", "--ssl_ca_certs=none"], 2, "rest_client: --ssl_ca_certs=none is not a "),
        (["clients.rest_client", "a.jpg", "--timeout_seconds=0"], 2, "rest_client: --timeout_seconds must be more"),
        (["clients.grpc_client", "a.jpg", "--ssl_ca_certs=README.md"], 2, "grpc_client: --ssl_ca_certs=README.md has"),
        (["clients.grpc_client", "a.jpg", "--ssl_certfile=README.md"], 2, "grpc_client: --ssl_certfile needs --ssl_c"),
        (["clients.grpc_client", "a.jpg", "--ssl_keyfile=README.md"], 2, "grpc_client: --ssl_keyfile needs --ssl_c"),
        (["clients.grpc_client", "a.jpg", "--api_key_file=README.md"], 1, "grpc_client: the API key must be prin"),
        (["clients.make_input"], 2, "usage: make_input.py PICTURE [PICTURE …] > input.json\n"),
        (["clients.make_input", "absent.jpg"], 1, "make_input.py: absent.jpg: No such file or directory\n"),
    ],
)  # fmt: skip
def test_a_client_that_cannot_do_its_work_ends_with_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run_client(*arguments)

    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert done.stderr.startswith(message)


@both_clients
def test_a_certificate_and_key_that_do_not_belong_together_are_reported_in_one_line(name: str, tmp_path: Path) -> None:
    authority = make_identity(tmp_path, "authority", None)
    client, other = (make_identity(tmp_path, party, authority) for party in ("client", "other"))
    flags = (f"--ssl_ca_certs={authority.certificate}", f"--ssl_certfile={client.certificate}")

    done = run_client(f"clients.{name}", "a.jpg", *flags, f"--ssl_keyfile={other.key}")

    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.endswith("are not a certificate and its key in PEM format\n")


def test_a_port_that_does_not_speak_http_is_reported_in_one_line(server: Server) -> None:
    done = run_client("clients.rest_client", "examples/picture.jpg", port=server.grpc_port)

    assert done.returncode == 1
    assert done.stderr.endswith("does not speak HTTP: see --address\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_standard_output_ends_the_client_silently(server: Server, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(CAT)
    command = [sys.executable, "-m", "clients.rest_client", f"--address=127.0.0.1:{server.http_port}"]

    with subprocess.Popen(
        [*command, f"{tmp_path}/*.png"], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)


def test_an_interrupt_ends_the_client_without_waiting(tmp_path: Path, make_gate: Callable[[str], Path]) -> None:
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


def test_a_json_file_that_is_no_request_is_reported(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"instances": [1]}')

    done = run_client("clients.grpc_client", f"{tmp_path}/odd.json")

    assert done.stderr == f"grpc_client: {tmp_path}/odd.json is not a V1 or V2 request with pictures\n"


def test_make_input_writes_a_request_with_all_pictures(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "grey.jpg").write_bytes(MODES["JPEG grey"])

    done = run_client("clients.make_input", f"{tmp_path}/cat.png", f"{tmp_path}/grey.jpg")

    assert json.loads(done.stdout) == json.loads(make_v1_request(CAT, MODES["JPEG grey"]))


def test_the_example_equals_what_its_script_draws() -> None:
    with Image.open(PROJECT / "examples/picture.jpg") as picture:
        difference = np.asarray(ImageChops.difference(picture, draw()))

    assert difference.max() < 64  # JPEG's loss at the edges
    request = json.loads((PROJECT / "examples/input.json").read_text())
    assert request == json.loads(make_v1_request((PROJECT / "examples/picture.jpg").read_bytes()))
