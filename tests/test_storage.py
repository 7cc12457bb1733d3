"""pinnace/models/storage.py: complete downloads of models from S3 and HTTP, and local paths."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import boto3
import httpx
import onnx
import pytest
from moto.server import ThreadedMotoServer

from pinnace.errors import DownloadError, PackageMissing
from pinnace.models import storage
from pinnace.models.storage import CHECKSUMS, fetch, redact_uri
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT
from tests.support.pods import NAMESPACES, run_pod, skip_without_namespaces
from tests.support.servers import (
    PROJECT,
    READY,
    START_SECONDS,
    TWO_WORKERS,
    Server,
    expect_start_failure,
    is_alive,
    run_server,
)
from tests.support.waiting import wait_for

BUCKET = "models"
URI = f"s3://{BUCKET}/alexnet"
PORTS = ("--http_port=0", "--grpc_port=0")


class S3:
    """A bucket on a real server, and the environment variables of its clients."""

    def __init__(self, endpoint: str) -> None:
        self.environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "name",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "S3_MAX_ATTEMPTS": "1",
        }
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="name",
            aws_secret_access_key="secret",  # noqa: S106
        )
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=f"alexnet/{name}", Body=content)

    def put_model(self, content: bytes) -> None:
        self.put("model", content)
        self.put(CHECKSUMS, f"{hashlib.sha256(content).hexdigest()}  model\n".encode())

    def put_all(self, directory: Path) -> None:
        for file in directory.iterdir():
            self._client.upload_file(str(file), BUCKET, f"alexnet/{file.name}")


@pytest.fixture
def s3() -> Iterator[S3]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        endpoint = f"http://{host}:{port}"
        httpx.post(f"{endpoint}/moto-api/reset")  # removes the objects of earlier tests
        yield S3(endpoint)
    finally:
        server.stop()


@pytest.fixture
def client(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """Make this process a client of the bucket."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


def read_downloads(server: Server) -> list[str]:
    return [line.partition("downloaded ")[2].split()[0] for line in server.log if "downloaded " in line]


def list_cache(cache: Path) -> list[str]:
    """Return the names of the directories in the cache, of models and of unfinished downloads."""
    return [path.name for path in cache.iterdir() if path.is_dir()]


def test_a_downloaded_model_gives_the_answers_of_the_original(
    s3: S3, model_dir: Path, server: Server, tmp_path: Path
) -> None:
    s3.put_all(model_dir)

    with run_server(
        f"--storage_cache_dir={tmp_path}", environment={**s3.environment, "STORAGE_URI": URI}
    ) as downloaded:
        assert read_downloads(downloaded) == [URI]
        assert downloaded.predict(make_v1_request(CAT)).text == server.predict(make_v1_request(CAT)).text
    assert len(list_cache(tmp_path)) == 1


def test_a_model_is_downloaded_again_only_when_its_checksums_have_changed(
    client: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text, expected in ((b"first", [URI]), (b"first", [CHECKSUMS]), (b"second", [CHECKSUMS, URI])):
        client.put_model(text)
        caplog.clear()
        with caplog.at_level("INFO"):
            path = fetch(URI, tmp_path)

        assert (path / "model").read_bytes() == text
        messages = [record.getMessage() for record in caplog.records if record.name == storage.__name__]
        assert [message.split()[1] for message in messages] == expected


def test_a_model_without_checksums_is_downloaded_at_every_start(client: S3, tmp_path: Path) -> None:
    for text in (b"first", b"second"):
        client.put("model", text)

        assert (fetch(URI, tmp_path) / "model").read_bytes() == text


def test_workers_download_a_model_once(s3: S3, tmp_path: Path) -> None:
    s3.put_model(b"text")
    flags = ("--predictor=tests.support.predictors:FromFile", f"--storage_uri={URI}", f"--storage_cache_dir={tmp_path}")
    with run_server(TWO_WORKERS, *flags, environment=s3.environment) as server:
        server.wait_for_line(READY)
        answers = {server.predict('{"instances": ["any"]}').text for _ in range(4)}
        assert server.stop() == 0

    assert answers == {'{"predictions":["text"]}'}
    assert read_downloads(server) == [URI]


def test_a_model_with_a_wrong_checksum_is_not_kept(client: S3, tmp_path: Path) -> None:
    client.put_model(b"text")
    client.put("model", b"tex.")

    with pytest.raises(DownloadError, match=rf"^model of --storage_uri={URI} does not match its SHA256SUMS$"):
        fetch(URI, tmp_path)
    assert list_cache(tmp_path) == []


def test_a_model_that_lacks_a_file_is_not_kept(client: S3, tmp_path: Path) -> None:
    client.put(CHECKSUMS, f"{'0' * 64}  model\n".encode())

    with pytest.raises(DownloadError, match=f"^--storage_uri={URI} lacks model, which its SHA256SUMS names$"):
        fetch(URI, tmp_path)
    assert list_cache(tmp_path) == []


def test_a_missing_object_stops_the_start_with_one_line(s3: S3, tmp_path: Path) -> None:
    code, lines = expect_start_failure(
        f"--storage_uri={URI}", f"--storage_cache_dir={tmp_path}", *PORTS, environment=s3.environment
    )

    assert code == 9
    assert lines[-1].startswith(f"pinnace: --storage_uri={URI} cannot be downloaded (")
    assert list_cache(tmp_path) == []


def test_a_failed_download_keeps_the_earlier_one(client: S3, tmp_path: Path) -> None:
    client.put_model(b"text")
    kept = fetch(URI, tmp_path)
    client.put(CHECKSUMS, f"{'0' * 64}  model\n".encode())

    with pytest.raises(DownloadError):
        fetch(URI, tmp_path)
    assert list_cache(tmp_path) == [kept.name]
    assert (kept / "model").read_bytes() == b"text"


def test_a_full_disk_stops_the_start_with_one_line(s3: S3, tmp_path: Path) -> None:
    skip_without_namespaces()
    s3.put("model.onnx", bytes(4_000_000))
    app = f"{sys.executable} app.py --storage_uri={URI} --storage_cache_dir={tmp_path} {' '.join(PORTS)}"
    command = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && {app}; code=$?; ls {tmp_path}; exit $code"
    namespaces = [name for name in NAMESPACES if name != "--net"]  # the bucket is outside of it

    done = subprocess.run(
        [*namespaces, "sh", "-c", command],
        cwd=PROJECT,
        env=s3.environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )

    assert done.returncode == 9, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert done.stdout.split() == [name for name in done.stdout.split() if name.endswith(".lock")]


class BreakingHandler(http.server.BaseHTTPRequestHandler):
    """Ends the connection in the middle of the body."""

    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested.append(self.path)
        self.send_response(200)
        self.send_header("content-type", "application/octet-stream")
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b"half")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def test_an_incomplete_download_is_discarded_and_its_error_contains_no_secret(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BreakingHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{web.server_port}/model.onnx"
        code, lines = expect_start_failure(
            f"--storage_uri=http://me:hidden@{address}?signature=hidden", f"--storage_cache_dir={tmp_path}", *PORTS
        )
        web.shutdown()

    assert BreakingHandler.requested
    assert code == 9
    assert lines[-1].startswith(f"pinnace: --storage_uri=http://{address} cannot be downloaded (")
    assert "hidden" not in "".join(lines)
    assert list_cache(tmp_path) == []


def test_a_download_ends_with_its_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}/model.onnx"
        flags = [f"--storage_uri={uri}", f"--storage_cache_dir={tmp_path}", *PORTS]
        with (
            subprocess.Popen([sys.executable, "app.py", *flags], cwd=PROJECT, stderr=subprocess.DEVNULL) as process,
            silent.accept()[0],
        ):
            (download,) = find_downloads(uri)
            process.terminate()
            assert process.wait(timeout=START_SECONDS) == 0

        wait_for(lambda: not is_alive(download), "the end of the download")


def find_downloads(uri: str) -> list[int]:
    """Return the ids of the processes that download `uri`."""
    command_lines = {path.parent.name: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [int(name) for name, line in command_lines.items() if f"pinnace.models.storage\0{uri}".encode() in line]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_local_path_is_not_copied(prefix: str, model_dir: Path, tmp_path: Path) -> None:
    with run_server(f"--storage_uri={prefix}{model_dir}", f"--storage_cache_dir={tmp_path}/cache") as server:
        assert server.predict(make_v1_request(CAT)).status_code == 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["/nowhere", "file:///nowhere", "pvc://claim/model"])
def test_a_missing_path_stops_the_start_with_one_line(uri: str) -> None:
    code, (line,) = expect_start_failure(f"--storage_uri={uri}", *PORTS)

    assert code == 4
    assert line.startswith(f"pinnace: --storage_uri={uri}")


@pytest.mark.parametrize("single", [False, True], ids=["directory", "file"])
def test_a_mounted_model_is_served_from_its_mount(single: bool, model_dir: Path, tmp_path: Path) -> None:
    """KServe sets STORAGE_URI to the read-only /mnt/models, whatever the source of the model is."""
    skip_without_namespaces()
    model = write_single_file(model_dir, tmp_path / "model.onnx") if single else model_dir
    for uri in ("/mnt/models", "pvc://claim/model"):
        with run_pod([], {"PATH": os.environ["PATH"], "STORAGE_URI": uri}, model) as it:
            assert it.get_status(8080, "/v2/models/custom-model/ready") == 200


def write_single_file(model_dir: Path, file: Path) -> Path:
    """Write the model and its weights to one file."""
    onnx.save(onnx.load(model_dir / "model.onnx"), file)
    return file


def test_the_error_of_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "LIBRARY", "a_library_that_is_not_installed")

    with pytest.raises(PackageMissing, match=r"pip install 'pinnace\[storage\]'"):
        fetch(URI, tmp_path)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/path", "s3://bucket/path"),
        ("https://me:secret@host/model.onnx", "https://host/model.onnx"),
        ("https://host/model.onnx?X-Signature=secret", "https://host/model.onnx"),
    ],
)
def test_redact_uri_removes_secrets(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown
