"""A stop, or a crash, at full load: what was accepted is answered, but what was in a process that crashed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest

from bench.subject import children
from tests.callers import Caller, Grpc, Http2, KeepAlive, Refused
from tests.pictures import CAT, v1_request
from tests.servers import READY, Server, running

CALLERS = 16
ANSWERS_BEFORE_STOP = 48
GRACE_SECONDS = 25
BACK_SECONDS = 10  # 3 where nothing else wants the CPUs
BODY = v1_request(CAT).encode()
KINDS = ["REST, keep-alive", "REST, HTTP/2", "gRPC", "gRPC on the HTTP port", "REST, two workers", "gRPC, two workers"]


def caller(kind: str, server: Server, google: ModuleType) -> Caller:
    if kind.startswith("gRPC"):
        return Grpc(server.http_port if kind.endswith("HTTP port") else server.grpc_port, google, CAT)
    return Http2(server, BODY) if kind.endswith("HTTP/2") else KeepAlive(server, BODY)


class Load:
    """Callers that ask until they are refused, or told to stop; all of their answers."""

    def __init__(self, callers: list[Caller]) -> None:
        self._callers = callers
        self.answers: list[list[float]] = []
        self.errors: list[BaseException] = []
        self.enough = asyncio.Event()
        self.may_ask = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for one in self._callers:
                tasks.create_task(self._ask_on(one))

    async def _ask_on(self, one: Caller) -> None:
        try:
            while self.may_ask:
                self.answers.append(await one.ask())
                if len(self.answers) >= ANSWERS_BEFORE_STOP:
                    self.enough.set()
        except Refused as error:
            self.errors.append(error)
        finally:
            await one.close()


def answered(log: Path) -> int:
    """How many the server says it has answered, which must be all that reached a handler."""
    lines = [line for line in log.read_text().splitlines() if '"POST /' in line]
    assert [line for line in lines if not line.endswith(" OK")] == []
    return len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("time_of_ten", range(10))
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_at_full_load_loses_nothing_that_was_accepted(
    kind: str, time_of_ten: int, model_dir: Path, tmp_path: Path, google: ModuleType
) -> None:
    log = tmp_path / "access"
    workers = 2 if kind.endswith("workers") else 1
    with (
        log.open("w") as stdout,
        running(f"--model_dir={model_dir}", f"--workers={workers}", stdout=stdout) as server,
    ):
        load = Load([caller(kind, server, google) for _ in range(CALLERS)])
        asking = asyncio.create_task(load.run())
        await asyncio.wait_for(load.enough.wait(), 60)
        stopped_at = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asking, 60)
        code = await asyncio.to_thread(server.wait)

    assert (code, time.monotonic() - stopped_at < GRACE_SECONDS) == (0, True), "".join(server.log[-60:])
    assert len(load.answers) == answered(log)
    np.testing.assert_allclose(load.answers, [load.answers[0]] * len(load.answers), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_clients_that_follow_readiness_see_no_error_at_all(
    kind: str, model_dir: Path, google: ModuleType
) -> None:
    workers = 2 if kind.endswith("workers") else 1
    flags = (f"--model_dir={model_dir}", f"--workers={workers}", "--drain_delay_seconds=3")
    with running(*flags) as server:
        load = Load([caller(kind, server, google) for _ in range(CALLERS)])
        asking = asyncio.create_task(load.run())
        await asyncio.wait_for(load.enough.wait(), 60)
        server.process.send_signal(signal.SIGTERM)
        async with httpx.AsyncClient(base_url=server.url) as probe:
            while (await probe.get("/v2/health/ready")).status_code == 200:
                pass
        load.may_ask = False
        await asyncio.wait_for(asking, 60)
        code = await asyncio.to_thread(server.wait)

    assert (code, load.errors) == (0, [])
    assert len(load.answers) > ANSWERS_BEFORE_STOP


@pytest.mark.slow
async def test_of_two_workers_one_that_is_killed_under_load_fails_what_was_inside_it_and_is_replaced(
    model_dir: Path, google: ModuleType
) -> None:
    with running(f"--model_dir={model_dir}", "--workers=2") as server:
        callers = [KeepAlive(server, BODY) for _ in range(CALLERS)]
        killed = children(server.process.pid)[0]
        answers: list[list[float]] = []
        failures: list[int] = []
        enough, stop = asyncio.Event(), asyncio.Event()

        async def ask_on(number: int) -> None:
            while not stop.is_set():
                try:
                    answers.append(await callers[number].ask())
                    if len(answers) >= ANSWERS_BEFORE_STOP:
                        enough.set()
                except Refused:
                    failures.append(number)
                    await callers[number].close()
                    callers[number] = KeepAlive(server, BODY)
            await callers[number].close()

        asking = [asyncio.create_task(ask_on(number)) for number in range(CALLERS)]
        await asyncio.wait_for(enough.wait(), 60)
        os.kill(killed, signal.SIGKILL)
        killed_at, answered_before = time.monotonic(), len(answers)
        await asyncio.to_thread(server.wait_for_line, re.compile("ended, exit code 137"))
        await asyncio.to_thread(server.wait_for_line, READY)
        back_seconds, answered_meanwhile = time.monotonic() - killed_at, len(answers) - answered_before
        stop.set()
        await asyncio.gather(*asking)
        code = await asyncio.to_thread(server.stop)

    sys.stdout.write(
        f"\n{len(failures)} of {CALLERS} callers lost their request, {answered_meanwhile} were answered in the "
        f"{back_seconds:.1f} s until the lost worker was back\n"
    )
    assert code == 0
    assert answered_meanwhile > 0
    assert len(failures) == len(set(failures)) <= CALLERS  # none failed twice: only what was inside
    assert back_seconds < BACK_SECONDS
    np.testing.assert_allclose(answers, [answers[0]] * len(answers), rtol=1e-5)
