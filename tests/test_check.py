"""pinnace/check.py: --check says what would be served, or ends as a start would."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.servers import PROJECT, Server, running

ECHO = "--predictor=tests.predictors:Echo"
LIMITS = "at most 128 requests of a model at once, 16 rows in a batch, 8 MiB a body, 60 s an answer"


def check(
    *flags: str, stderr: int = subprocess.PIPE, environment: Mapping[str, str] = os.environ
) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, last line of standard error."""
    done = subprocess.run(
        [sys.executable, "app.py", "--check", *flags],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), (done.stderr or "\n").splitlines()[-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_it_says_what_would_be_served_and_by_which_ports(workers: int, model_dir: Path) -> None:
    code, lines, _ = check(f"--model_dir={model_dir}", f"--workers={workers}")

    assert (code, lines) == (
        0,
        [
            "custom-model: architecture alexnet, weights seeded:0, precision fp32, device cpu",
            LIMITS,
            "it would be served on HTTP port 8080 and gRPC port 8081",
        ],
    )


def test_a_start_says_the_same_once_it_is_ready(model_dir: Path) -> None:
    with running(f"--model_dir={model_dir}") as server:
        server.wait_for_line(re.compile("custom-model: architecture alexnet, weights seeded:0, precision fp32"))
        server.wait_for_line(re.compile(LIMITS))


def test_it_listens_nowhere(server: Server) -> None:
    code, lines, _ = check(ECHO, f"--http_port={server.http_port}", "--enable_grpc=false")

    assert (code, lines[-1]) == (0, f"it would be served on HTTP port {server.http_port}")


def test_each_of_several_models_must_load(tmp_path: Path) -> None:
    code, lines, problem = check(f"--model=good=,bad={tmp_path}/none", "--predictor=good=tests.predictors:Echo")

    assert (code, lines) == (4, [])
    assert problem == f"pinnace: {tmp_path}/none, where bad should be, does not exist: see --model_dir"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--no_such_flag"], 2),
        ([ECHO, "--ssl_certfile=none", "--ssl_keyfile=none"], 2),
        ([ECHO, "--api_key_file=none"], 2),
        (["--model_dir=none"], 4),
        (["--model_dir=README.md"], 5),
        (["--predictor=none:None"], 7),
    ],
)
def test_what_would_stop_a_start_stops_it_with_the_same_code(flags: list[str], code: int) -> None:
    found, lines, problem = check(*flags)

    assert (found, lines) == (code, [])
    assert problem.startswith("pinnace: ")


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_levels_are_coloured_on_a_terminal_unless_that_is_unwanted(
    environment: dict[str, str], coloured: bool, model_dir: Path
) -> None:
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}

    check(f"--model_dir={model_dir}", stderr=theirs, environment={**kept, **environment})

    os.close(theirs)
    shown = os.read(ours, 65536)
    os.close(ours)
    assert b"UNTRAINED WEIGHTS" in shown
    assert (b"\033[33mWARNING\033[0m" in shown) == coloured
