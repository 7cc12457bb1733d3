"""Faults around a running server: a full disk, a clock that jumps, an overwritten model, half a message."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import h2.connection
import h2.events
import httpx
import numpy as np
import pytest

from tests.support.callers import Caller, Grpc, Http2, KeepAlive
from tests.support.clients import INFER, PREDICT, make_v1_request
from tests.support.metrics import metric_value
from tests.support.pictures import CAT
from tests.support.servers import Server, read_until, run_server
from tests.support.waiting import wait_for

BODY = make_v1_request(CAT).encode()
HALF = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{" % PREDICT.encode()
DAY_SECONDS = 24 * 3600
JUMPING_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* A day ahead at about half of the readings. */
static long jump(void) {
    static unsigned readings;
    return (__atomic_fetch_add(&readings, 1, __ATOMIC_RELAXED) * 2654435761u >> 31) * 24 * 3600;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*libcs)(clockid_t, struct timespec *);
    if (!libcs) libcs = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = libcs(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""


@pytest.fixture
def jumping_clock(tmp_path: Path) -> Path:
    """Compile a library to preload, with which the time of day jumps between readings."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler for a clock that jumps")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(JUMPING_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


@contextmanager
def keep_sending(server: Server, model: str, expected: object) -> Iterator[None]:
    """Send requests from two clients during the `with` block and a little longer. Every answer must be correct."""
    answers = []
    may_send = True

    def send() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while may_send:
                response = client.post(f"/v1/models/{model}:predict", content=BODY)
                assert (response.status_code, response.json()) == (200, expected)
                answers.append(response)

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(send) for _ in range(2)]
        try:
            yield
            seen = len(answers)
            wait_for(lambda: len(answers) > seen + 4 or any(call.done() for call in calls), "five more answers")
        finally:
            may_send = False
        for call in calls:
            call.result()


async def test_requests_are_answered_when_the_disk_of_the_log_is_full(model_dir: Path, google: ModuleType) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with run_server(f"--model_dir={model_dir}", stdout=full) as server:
        os.close(full)
        expected = server.predict(BODY).json()
        assert len(expected["predictions"]) == 1
        answers = await _predict_in_turn([Grpc(server.grpc_port, google, CAT)], 2)
        np.testing.assert_allclose(answers, expected["predictions"] * 2, rtol=1e-6)
        assert server.post("/v1/models/nobody:predict", BODY).status_code == 404
        assert server.stop() == 0


async def test_a_wall_clock_that_jumps_by_a_day_changes_nothing_but_dates(
    model_dir: Path, google: ModuleType, jumping_clock: Path
) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(jumping_clock)}
    flags = (f"--model_dir={model_dir}", "--read_timeout_seconds=1", "--request_timeout_seconds=30")
    with run_server(*flags, environment=environment) as server:
        with server.connect() as half:
            half.sendall(HALF)
            callers = [KeepAlive(server, BODY), Http2(server, BODY), Grpc(server.grpc_port, google, CAT)]
            answers = await _predict_in_turn(callers, 8)
            np.testing.assert_allclose(answers, np.repeat(answers[:1], len(answers), axis=0), rtol=1e-6)
            assert read_until(half, b'(1)"}').startswith(b"HTTP/1.1 408 ")
        dates = [parsedate_to_datetime(server.get("/").headers["date"]) for _ in range(30)]
        jumps = [abs((after - before).total_seconds()) for before, after in pairwise(dates)]
        assert max(jumps) > DAY_SECONDS / 2
        for handler in ("preprocess", "predict", "postprocess"):
            seconds = metric_value(server, f"request_{handler}_seconds_sum", model_name="custom-model")
            assert 0 < seconds < 60
        assert server.stop() == 0


async def _predict_in_turn(callers: list[Caller], times: int) -> list[list[float]]:
    answers = [await caller.predict() for _ in range(times) for caller in callers]
    for caller in callers:
        await caller.close()
    return answers


def test_a_model_file_overwritten_by_garbage_under_load_affects_only_the_next_load_of_that_model(
    model_dir: Path, tmp_path: Path
) -> None:
    good, other = tmp_path / "good", tmp_path / "other"
    for folder in (good, other):
        shutil.copytree(model_dir, folder)
    models = f"--model=good={good},other={other}"
    with run_server(models, "--enable_model_repository=true") as server:
        expected = server.post("/v1/models/good:predict", BODY).json()
        with keep_sending(server, "good", expected):
            with keep_sending(server, "other", expected):
                for file in list(other.iterdir()):
                    garbage = tmp_path / "garbage"
                    garbage.write_bytes(os.urandom(100_000))
                    garbage.replace(file)
            assert server.post("/v2/repository/models/other/unload", "").status_code == 200
            refused = server.post("/v2/repository/models/other/load", "")
            assert refused.status_code == 503
            assert str(tmp_path) not in refused.text
            assert server.post("/v1/models/other:predict", BODY).status_code == 503
            assert server.get("/v2/health/ready").status_code == 200

            shutil.copytree(model_dir, other, dirs_exist_ok=True)
            assert server.post("/v2/repository/models/other/load", "").status_code == 200
            assert server.post("/v1/models/other:predict", BODY).json() == expected
        assert server.stop() == 0
    assert [line for line in server.log if "other could not be loaded" in line]


@contextmanager
def send_half_a_message(server: Server) -> Iterator[None]:
    """Open a call on the gRPC port and send half of its message. Yield when the server has received that."""
    client = h2.connection.H2Connection()
    client.initiate_connection()
    pseudo = [(":method", "POST"), (":path", INFER), (":scheme", "http"), (":authority", "x")]
    client.send_headers(1, [*pseudo, ("content-type", "application/grpc"), ("te", "trailers")])
    client.send_data(1, b"\0\0\0\x03\xe8half")
    client.ping(b"all sent")
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=30) as connection:
        connection.sendall(client.data_to_send())
        seen: list[h2.events.Event] = []
        while not any(isinstance(event, h2.events.PingAckReceived) for event in seen):
            seen += client.receive_data(connection.recv(65536))
        yield


def test_half_a_grpc_message_does_not_delay_a_stop_beyond_the_grace_period() -> None:
    flags = ("--predictor=tests.support.predictors:Echo", "--grace_period_seconds=1")
    with run_server(*flags) as server, send_half_a_message(server):
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
