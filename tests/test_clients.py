"""clients/: what they print, and the one line that they end with when something is wrong."""

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
from tests.certificates import make_party
from tests.pictures import CAT, MODES, v1_request
from tests.servers import PROJECT, Server, gated, running


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


BOTH = pytest.mark.parametrize("name", ["rest_client", "grpc_client"])


def port_of(server: Server, name: str) -> int:
    return server.http_port if name == "rest_client" else server.grpc_port


def expected(server: Server, picture: bytes) -> list[tuple[str, float]]:
    request = {**json.loads(v1_request(picture)), "signature_name": "classification"}
    (row,) = server.predict(json.dumps(request)).json()["predictions"]
    return [(one["label"], one["probability"]) for one in row]


@BOTH
def test_a_client_prints_each_pictures_labels_and_time(name: str, server: Server, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(CAT)

    done = client(f"clients.{name}", f"{tmp_path}/*.png", port=port_of(server, name))

    lines = done.stdout.splitlines()
    assert [re.sub(r"\d+ ms$", "", line) for line in lines[::6]] == [
        f"{tmp_path}/{number}.png  " for number in range(3)
    ]
    assert lines[1:6] == [f"  {probability:6.1%}  {label}" for label, probability in expected(server, CAT)]
    assert re.fullmatch(r"3 pictures in [\d.]+ s, [\d.]+ a second, 0 failed\n", done.stderr)


@BOTH
@pytest.mark.parametrize("kind", ["V1 request", "V2 request", "URL"])
def test_a_client_reads_requests_of_either_protocol_and_urls(
    name: str, kind: str, server: Server, tmp_path: Path
) -> None:
    request = json.loads(v1_request(CAT))
    if kind == "V2 request":
        text = request["instances"][0]["image"]["b64"]
        request = {"inputs": [{"name": "input-0", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    (tmp_path / "input.json").write_text(json.dumps(request))
    (tmp_path / "cat.png").write_bytes(CAT)
    with serving_files(tmp_path) as url:
        source = f"{url}/cat.png" if kind == "URL" else f"{tmp_path}/input.json"
        done = client(f"clients.{name}", source, "--format=json", port=port_of(server, name))

    (found,) = json.loads(done.stdout)
    assert found["picture"].startswith(source)
    classes = expected(server, CAT)
    assert [one["label"] for one in found["classes"]] == [label for label, _ in classes]
    assert [one["probability"] for one in found["classes"]] == pytest.approx([one for _, one in classes])


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = Thread(target=files.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{files.server_port}"
        finally:
            files.shutdown()
            thread.join()


@BOTH
def test_what_has_no_answer_is_told_and_the_others_are_written(name: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "half.png").write_bytes(CAT[:200])
    pictures = [f"{tmp_path}/half.png", f"{tmp_path}/cat.png", "absent.jpg"]

    done = client(
        f"clients.{name}", *pictures, "--format=csv", f"--output={tmp_path}/found.csv", port=port_of(server, name)
    )

    problems = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(problems)) == (1, "", 3)
    assert problems[0].startswith(f"{name}: {tmp_path}/half.png: 127.0.0.1:{port_of(server, name)} answered ")
    assert problems[1] == f"{name}: absent.jpg: No such file or directory"
    assert problems[2].endswith(", 2 failed")
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert [row["picture"] for row in rows] == [f"{tmp_path}/cat.png"] * 5
    assert [row["label"] for row in rows] == [label for label, _ in expected(server, CAT)]


@BOTH
def test_a_client_shows_its_key_and_certificate(name: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    authority = make_party(tmp_path, "authority", None)
    own, other = (make_party(tmp_path, one, authority) for one in ("server", "client"))
    asked = (f"--ssl_ca_certs={authority.certificate}", f"--api_key_file={tmp_path}/key")
    shown = (f"--ssl_certfile={other.certificate}", f"--ssl_keyfile={other.key}")
    served = (f"--ssl_certfile={own.certificate}", f"--ssl_keyfile={own.key}")
    with running(f"--model_dir={model_dir}", *served, *asked) as server:
        picture = (f"clients.{name}", "examples/picture.jpg")
        address = f"--address=localhost:{port_of(server, name)}"
        welcome = client(*picture, address, *asked, *shown)
        stranger = client(*picture, address, *asked)
        keyless = client(*picture, address, asked[0], *shown)

    assert (welcome.returncode, len(welcome.stdout.splitlines())) == (0, 6)
    assert (stranger.returncode, len(stranger.stderr.splitlines())) == (1, 1)
    assert (keyless.returncode, "an API key is required" in keyless.stderr) == (1, True)


@BOTH
def test_a_client_comes_again_when_a_busy_server_says_so(name: str, model_dir: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (4000, 4000)).save(tmp_path / f"{number}.jpg")  # at once, and each for a while

    with running(f"--model_dir={model_dir}", "--max_concurrent_requests=1") as server:
        done = client(f"clients.{name}", f"{tmp_path}/*.jpg", "--connections=3", port=port_of(server, name))
        assert 'outcome="rejected"' in server.get("/metrics").text

    assert (done.returncode, len(done.stdout.splitlines())) == (0, 18)


@BOTH
def test_a_client_calls_the_model_and_the_host_of_the_environment(name: str, server: Server) -> None:
    done = client(
        f"clients.{name}",
        "examples/picture.jpg",
        port=port_of(server, name),
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
def test_a_client_that_cannot_do_its_work_ends_with_one_line(arguments: list[str], code: int, problem: str) -> None:
    done = client(*arguments)

    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert done.stderr.startswith(problem)


def test_a_port_that_speaks_something_else_is_told_in_one_line(server: Server) -> None:
    done = client("clients.rest_client", "examples/picture.jpg", port=server.grpc_port)

    assert done.returncode == 1
    assert done.stderr.endswith("does not speak HTTP: see --address\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_enough_is_no_failure_of_a_picture(server: Server, tmp_path: Path) -> None:
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


def test_an_interrupt_ends_the_asking(tmp_path: Path, gate: Callable[[str], Path]) -> None:
    held = gate("held")
    request = {"instances": [{"image": {"b64": base64.b64encode(b"held").decode()}}] * 50}
    (tmp_path / "input.json").write_text(json.dumps(request))
    with gated(tmp_path, "--max_asyncio_workers=1") as server:
        command = [sys.executable, "-m", "clients.rest_client", f"--address=127.0.0.1:{server.http_port}"]
        with subprocess.Popen(
            [*command, f"{tmp_path}/input.json"], cwd=PROJECT, stderr=subprocess.PIPE, text=True
        ) as cli:
            with held.open("wb"):
                cli.send_signal(signal.SIGINT)
            assert cli.wait(timeout=30) == 130
            assert cli.stderr
            assert "Traceback" not in cli.stderr.read()


def test_a_file_that_is_no_request_is_told_from_one(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"instances": [1]}')

    done = client("clients.grpc_client", f"{tmp_path}/odd.json")

    assert done.stderr == f"grpc_client: {tmp_path}/odd.json is no V1 or V2 request with pictures\n"


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
