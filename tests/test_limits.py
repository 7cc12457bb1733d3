"""pinnace/http/limits.py: bodies that are too large, too slow or not read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.clients import make_v1_request
from tests.support.pictures import CAT
from tests.support.servers import Server, read_until, run_server

LIMIT = 17 * 1024 * 1024

DECLARED_TOO_LARGE = (
    b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 300000000\r\n\r\n"
)
HALF_A_BODY = (
    b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"instances": ['
)
PIPELINED = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    file = tmp_path / "large"
    file.write_bytes(bytes(LIMIT + 1))
    return file


@pytest.mark.parametrize("transfer", ["Content-Length", "Transfer-Encoding: chunked"])
def test_a_body_over_the_limit_is_413_with_a_length_or_chunked(transfer: str, server: Server, large_file: Path) -> None:
    header = ["-H", transfer] if ":" in transfer else []
    url = f"{server.url}/v1/models/custom-model:predict"
    done = subprocess.run(
        ["curl", "-sS", "-m", "30", "-w", " %{http_code}", *header, "--data-binary", f"@{large_file}", url],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == f'{{"error":"the body exceeds max_body_bytes ({LIMIT})"}} 413'


def test_a_body_of_exactly_the_limit_is_read(server: Server) -> None:
    body = b'{"instances": [' + b" " * (LIMIT - 17) + b"]}"

    response = server.predict(body)

    assert len(body) == LIMIT
    assert response.json() == {"error": '"instances" is empty'}


def test_a_declared_length_over_the_limit_is_answered_before_the_body_arrives(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(DECLARED_TOO_LARGE)
        answer = read_until(connection, b'{"error":"the body exceeds max_body_bytes (17825792)"}')

    assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_error_reaches_a_client_that_sends_its_whole_body_first(server: Server) -> None:
    for path in ("/v1/models/nope:predict", "/nope", "/v1/models"):
        response = server.post(path, bytes(3_000_000))  # far beyond what Hypercorn queues unread
        assert response.status_code in (404, 405)
        assert response.json().keys() == {"error"}


def test_an_error_before_the_body_does_not_affect_other_requests_of_an_http_2_connection(server: Server) -> None:
    with httpx.Client(base_url=server.url, http1=False, http2=True, timeout=30) as client:
        client.get("/")
        for path, body in (("/v1/models/nope:predict", bytes(3_000_000)), ("/v1/models", bytes(LIMIT + 1))) * 3:
            assert client.post(path, content=body).json().keys() == {"error"}
            assert client.get("/v2/health/live").json() == {"live": True}


@pytest.mark.parametrize("length", [b"9" * 19, b"9" * 5000, b"-1", b"1e3", b""])
def test_an_absurd_length_is_refused(length: bytes, server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n"
        )
        status = connection.recv(65536).split()[1]

    assert status in (b"400", b"413")


def test_unread_bodies_leave_no_connection_open(server: Server) -> None:
    server.get("/")
    before = server.count_descriptors()

    for _ in range(20):
        server.post("/v1/models/nope:predict", bytes(3_000_000))
        with server.connect() as connection:
            connection.sendall(DECLARED_TOO_LARGE + bytes(100_000))
        with server.connect() as connection:
            connection.sendall(HALF_A_BODY)

    server.wait_for_descriptors(before)


def test_a_client_that_disconnects_in_the_middle_of_its_body_is_not_logged_as_an_error(server: Server) -> None:
    seen = len(server.log)
    with server.connect() as connection:
        connection.sendall(HALF_A_BODY)

    assert server.predict(make_v1_request(CAT), x_request_id="the-next-one").status_code == 200
    server.wait_for_line(re.compile("requestId: the-next-one"))
    assert not [line for line in server.log[seen:] if re.search("ERROR|Traceback", line)]


def test_pipelined_requests_are_answered(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(PIPELINED)
        answers = b""
        while answers.count(b"HTTP/1.1 200 ") < 3:
            answers += read_until(connection, b'{"live":true}')

    assert answers.count(b'{"live":true}') == 3


def test_a_body_that_arrives_too_slowly_is_refused_and_its_connection_closed() -> None:
    with run_server("--predictor=tests.support.predictors:Echo", "--read_timeout_seconds=1") as server:
        with server.connect() as connection:
            connection.sendall(HALF_A_BODY)
            answer = read_until(connection, b'(1)"}')
            assert connection.recv(65536) == b""

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'{"error":"the request was not received within read_timeout_seconds (1)"}' in answer
        assert server.predict('{"instances": [1]}').json() == {"predictions": [1]}


@pytest.mark.parametrize("http2", [False, True])
def test_a_request_head_of_more_than_16_kib_is_431(http2: bool, server: Server) -> None:
    with httpx.Client(base_url=server.url, http1=not http2, http2=http2, timeout=30) as client:
        path = "/v1/models/custom-model:predict"
        large = client.post(path, content=make_v1_request(CAT), headers={"x-large": "a" * 17_000})
        long = client.post(f"{path}?{'a' * 17_000}", content=make_v1_request(CAT))
        allowed = client.post(path, content=make_v1_request(CAT), headers={"x-large": "a" * 15_000})

    assert (large.status_code, long.status_code, allowed.status_code) == (431, 431, 200)
    assert large.json() == long.json() == {"error": "the request line and headers exceed 16384 bytes"}
