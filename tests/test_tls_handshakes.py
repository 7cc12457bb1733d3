"""TLS handshakes: they count as connections, and have a time."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.support.certificates import Identity, make_identity
from tests.support.servers import Server, run_server
from tests.support.unread import make_echo_request

ECHO = "--predictor=tests.support.predictors:Echo"
LIMIT = 8


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("authority"), "authority", None)


@pytest.fixture(scope="module")
def tls_flags(tmp_path_factory: pytest.TempPathFactory, authority: Identity) -> tuple[str, ...]:
    own = make_identity(tmp_path_factory.mktemp("server"), "server", authority)
    return (ECHO, f"--ssl_certfile={own.certificate}", f"--ssl_keyfile={own.key}", "--read_timeout_seconds=2")


@pytest.fixture(scope="module", params=["asyncio", "uvloop"], name="secure")
def run_secure_server(request: pytest.FixtureRequest, tls_flags: tuple[str, ...]) -> Iterator[Server]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop is not installed")
    with run_server(*tls_flags, f"--max_connections={LIMIT}", f"--event_loop={request.param}") as server:
        yield server


def open_https_client(server: Server, authority: Identity, http2: bool = False) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    return httpx.Client(base_url=server.url.replace("http:", "https:"), verify=context, timeout=30, http2=http2)


@pytest.mark.parametrize("secure", ["asyncio"], indirect=True)  # uvloop makes the handshakes itself
def test_silent_handshakes_count_as_connections_and_make_room_for_others(secure: Server, authority: Identity) -> None:
    with open_https_client(secure, authority) as client:
        client.get("/")
    before = secure.count_descriptors()
    with ExitStack() as stack:
        for _ in range(10 * LIMIT):
            stack.enter_context(secure.connect())
        for _ in range(10):
            with open_https_client(secure, authority) as client:
                assert client.get("/v2/health/ready").json() == {"ready": True}

        assert secure.count_descriptors() <= before + LIMIT + 1


def test_a_silent_handshake_is_closed_after_read_timeout_seconds(secure: Server) -> None:
    with secure.connect() as silent:
        assert silent.recv(65536) == b""


@pytest.mark.parametrize("http2", [False, True])
def test_large_bodies_and_responses_pass(http2: bool, secure: Server, authority: Identity) -> None:
    body = make_echo_request(2_000_000)
    with open_https_client(secure, authority, http2) as client:
        for _ in range(2):
            response = client.post("/v1/models/custom-model:predict", content=body)
            assert len(response.json()["predictions"][0]) == 2_000_000


def test_neither_a_silent_handshake_nor_an_idle_client_holds_a_stop(
    tls_flags: tuple[str, ...], authority: Identity
) -> None:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    flags = (*tls_flags, "--read_timeout_seconds=60", "--send_timeout_seconds=1", "--grace_period_seconds=60")
    with (
        run_server(*flags) as server,
        server.connect(),
        server.connect() as plain,
        context.wrap_socket(plain, server_hostname="localhost") as idle,
    ):
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200 ")
        started_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started_at < 30  # it is 1 to 2 s

    assert not [line for line in server.log if "Traceback" in line]
