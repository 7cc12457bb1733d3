"""pinnace/auth.py, and TLS on both ports: without a key or certificate a client may only call probes."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import pytest

from tests.support.certificates import Identity, encrypt_key, make_identity
from tests.support.clients import call_grpc, make_image_request
from tests.support.servers import PROJECT, Server, expect_start_failure, run_server

ECHO = "--predictor=tests.support.predictors:Echo"
KEYS = ("first-key", "second-key")
PROBES = ("/", "/v2/health/live", "/v2/health/ready", "/v1/models/custom-model", "/v2/models/custom-model/ready")
CLOSED = (
    ("GET", "/metrics"),
    ("GET", "/v2"),
    ("GET", "/v1/models"),
    ("GET", "/v2/models/custom-model"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("POST", "/v1/models/custom-model"),
    ("POST", "/v1/models/custom-model:predict"),
    ("GET", "/v1/models/custom-model%3Apredict"),
    ("POST", "/v2/models/custom-model/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/custom-model/unload"),
)
GRPC_PROBES = ("ServerLive", "ServerReady", "ModelReady")
GRPC_CLOSED = ("ServerMetadata", "ModelMetadata", "ModelInfer", "RepositoryIndex", "RepositoryModelUnload")
NO_KEY = "an API key is required: send it as 'Authorization: Bearer KEY'"
NO_CERTIFICATE = "a client certificate is required"
BODY = '{"instances": [1]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("credentials")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Identity:
    return make_identity(folder, "authority", None)


@pytest.fixture(scope="module")
def own(folder: Path, authority: Identity) -> Identity:
    return make_identity(folder, "server", authority)


@pytest.fixture(scope="module")
def client(folder: Path, authority: Identity) -> Identity:
    return make_identity(folder, "client", authority)


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Identity:
    return make_identity(folder, "stranger", make_identity(folder, "another authority", None))


@pytest.fixture(scope="module")
def keyed(folder: Path) -> Iterator[Server]:
    """Run a server that requires a key."""
    file = folder / "keys"
    file.write_text("\n".join(KEYS) + "\n")
    with run_server(ECHO, f"--api_key_file={file}", "--cors_allow_origins=https://a.example") as server:
        yield server


@pytest.fixture(scope="module")
def mutual(own: Identity, authority: Identity) -> Iterator[Server]:
    """Run a server that requires a client certificate."""
    flags = (f"--ssl_certfile={own.certificate}", f"--ssl_keyfile={own.key}", f"--ssl_ca_certs={authority.certificate}")
    with run_server(ECHO, *flags) as server:
        yield server


def open_https_client(
    server: Server, authority: Identity, identity: Identity | None = None, **options: Any
) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if identity:
        context.load_cert_chain(identity.certificate, identity.key)
    return httpx.Client(base_url=server.url.replace("http:", "https:"), verify=context, timeout=30, **options)


def open_secure_channel(port: int, authority: Identity, identity: Identity | None = None) -> grpc.Channel:
    key, certificate = identity.pem if identity else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), key, certificate)
    return grpc.secure_channel(f"localhost:{port}", credentials)


def call_method(channel: grpc.Channel, google: ModuleType, method: str, **metadata: str) -> tuple[str, str | None]:
    """Call a method of the inference service, and return status and details."""
    unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
    model_name = "custom-model" if method == "ModelReady" else ""
    message = google.ModelReadyRequest(name=model_name).SerializeToString()
    try:
        unary(message, timeout=30, metadata=tuple(metadata.items()))
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


@pytest.mark.parametrize("path", PROBES)
def test_probes_need_no_key(path: str, keyed: Server) -> None:
    assert keyed.get(path).status_code == 200


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_other_route_needs_a_key(method: str, path: str, keyed: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "Basic first-key"}):
        refused = httpx.request(method, keyed.url + path, headers=headers, content=BODY)

        assert (refused.status_code, refused.json()) == (401, {"error": NO_KEY})
        assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_of_the_file_is_accepted(key: str, scheme: str, keyed: Server) -> None:
    assert keyed.predict(BODY, authorization=f"{scheme} {key}").json() == {"predictions": [1]}


def test_a_preflight_request_needs_no_key_and_a_web_page_can_read_the_refusal(keyed: Server) -> None:
    page = {"Origin": "https://a.example"}
    preflight = httpx.options(
        f"{keyed.url}/v1/models/custom-model:predict", headers=page | {"Access-Control-Request-Method": "POST"}
    )
    refused = httpx.post(f"{keyed.url}/v1/models/custom-model:predict", headers=page, content=BODY)

    assert preflight.status_code == 200
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
def test_over_grpc_only_probes_need_no_key(port: str, keyed: Server, google: ModuleType) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{keyed.grpc_port if port == 'gRPC port' else keyed.http_port}") as channel:
        for method in GRPC_PROBES:
            assert call_method(channel, google, method) == ("OK", "")
        health: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"", timeout=30)
        for method in GRPC_CLOSED:
            assert call_method(channel, google, method) == ("UNAUTHENTICATED", NO_KEY)
            assert call_method(channel, google, method, authorization="Bearer x") == ("UNAUTHENTICATED", NO_KEY)
        assert call_method(channel, google, "ServerMetadata", authorization="Bearer first-key") == ("OK", "")


def test_without_a_client_certificate_https_answers_only_probes(mutual: Server, authority: Identity) -> None:
    with open_https_client(mutual, authority) as anonymous:
        for path in PROBES:
            assert anonymous.get(path).status_code == 200
        for method, path in CLOSED:
            refused = anonymous.request(method, path, content=BODY)
            assert (refused.status_code, refused.json()) == (401, {"error": NO_CERTIFICATE})


@pytest.mark.parametrize("http2", [False, True])
def test_https_answers_a_client_with_a_certificate_of_the_authority(
    http2: bool, mutual: Server, authority: Identity, client: Identity
) -> None:
    with open_https_client(mutual, authority, client, http1=not http2, http2=http2) as known:
        response = known.post("/v1/models/custom-model:predict", content=BODY)

    assert (response.json(), response.http_version) == ({"predictions": [1]}, "HTTP/2" if http2 else "HTTP/1.1")


def test_a_certificate_of_another_authority_is_refused_on_both_ports(
    mutual: Server, authority: Identity, stranger: Identity, google: ModuleType
) -> None:
    with open_https_client(mutual, authority, stranger) as unknown, pytest.raises(httpx.TransportError):
        unknown.get("/")
    for port in (mutual.http_port, mutual.grpc_port):
        with open_secure_channel(port, authority, stranger) as channel:
            assert call_method(channel, google, "ServerLive")[0] == "UNAVAILABLE"


def test_grpc_over_tls_answers_a_client_with_a_certificate_on_both_ports(
    mutual: Server, authority: Identity, client: Identity, google: ModuleType
) -> None:
    for port in (mutual.grpc_port, mutual.http_port):
        with open_secure_channel(port, authority, client) as channel:
            response = call_grpc(channel, google, "ModelInfer", make_image_request(google, b"x"))
            assert response.outputs[0].contents.bytes_contents == [b"x"]


def test_without_a_certificate_the_http_port_answers_probes_and_the_grpc_port_nothing(
    mutual: Server, authority: Identity, google: ModuleType
) -> None:
    with open_secure_channel(mutual.grpc_port, authority) as channel:
        assert call_method(channel, google, "ServerLive")[0] == "UNAVAILABLE"
    with open_secure_channel(mutual.http_port, authority) as channel:
        assert call_method(channel, google, "ServerLive") == ("OK", "")
        assert call_method(channel, google, "ModelInfer") == ("UNAUTHENTICATED", NO_CERTIFICATE)


def test_both_ports_speak_only_tls_1_2_and_newer(mutual: Server, client: Identity) -> None:
    def connect_with_openssl(port: int, *flags: str) -> str:
        credentials = ["-cert", str(client.certificate), "-key", str(client.key)]
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2", *credentials, *flags]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
        return done.stdout.decode("latin-1")

    for port in (mutual.http_port, mutual.grpc_port):
        assert "TLSv1.2, Cipher is ECDHE" in connect_with_openssl(port, "-tls1_2")
        assert "TLSv1.3, Cipher is TLS_" in connect_with_openssl(port, "-tls1_3")
        assert "Cipher is (NONE)" in connect_with_openssl(port, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
    with pytest.raises(httpx.TransportError):
        httpx.get(mutual.url)


def test_the_healthcheck_works_over_tls(own: Identity, authority: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = (f"--ssl_certfile={own.certificate}", f"--ssl_keyfile={own.key}", f"--ssl_ca_certs={authority.certificate}")
    with run_server(ECHO, *tls, f"--http_port={port}") as server:
        command = [sys.executable, "-m", "pinnace.process.healthcheck", str(server.process.pid)]
        subprocess.run(command, cwd=PROJECT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--ssl_certfile={own}"], "--ssl_certfile and --ssl_keyfile belong together: give both"),
        (["--ssl_keyfile={key}"], "--ssl_certfile and --ssl_keyfile belong together: give both"),
        (["--ssl_ca_certs={own}"], "--ssl_ca_certs needs --ssl_certfile: certificates are shown over TLS"),
        (
            ["--ssl_certfile={own}", "--ssl_keyfile={own}"],
            "--ssl_certfile, --ssl_keyfile or --ssl_ca_certs cannot be used: ",
        ),
        (
            ["--ssl_certfile={own}", "--ssl_keyfile={encrypted}"],
            "--ssl_certfile, --ssl_keyfile or --ssl_ca_certs cannot be used: ",
        ),
        (
            ["--ssl_certfile=/nowhere", "--ssl_keyfile={key}"],
            "--ssl_certfile=/nowhere cannot be read: No such file or directory",
        ),
        (
            ["--ssl_certfile={own}", "--ssl_keyfile=/nowhere"],
            "--ssl_keyfile=/nowhere cannot be read: No such file or directory",
        ),
        (["--api_key_file=/nowhere"], "--api_key_file=/nowhere cannot be read: No such file or directory"),
        (["--api_key_file={empty}"], "--api_key_file={empty} contains no key"),
        (["--api_key_file={words}"], "--api_key_file={words}, line 1: a key must not contain a blank"),
    ],
)
def test_unusable_certificate_or_key_files_stop_the_start(
    flags: list[str], problem: str, own: Identity, tmp_path: Path
) -> None:
    files = {"own": own.certificate, "key": own.key, "empty": tmp_path / "empty", "words": tmp_path / "words"}
    files["empty"].write_text("\n")
    files["words"].write_text("two words\n")
    files["encrypted"] = encrypt_key(own.key, tmp_path)
    formatted = [flag.format(**files) for flag in flags]

    code, lines = expect_start_failure(ECHO, "--http_port=0", "--grpc_port=0", *formatted)

    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"pinnace: {problem.format(**files)}")
