"""pinnace/process/check.py: --check prints a summary of what the server would serve, or fails as a start would."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.servers import PROJECT, Server, run_server

ECHO = "--predictor=tests.support.predictors:Echo"
LIMITS = "limits: 128 concurrent requests per model, 16 rows per batch, 17 MiB per body, 60 s per request"


def run_check(
    *flags: str, stderr: int = subprocess.PIPE, environment: Mapping[str, str] = os.environ
) -> tuple[int, list[str], str]:
    """Run app.py --check. Return exit code, lines of standard output, and the last line of standard error."""
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
def test_check_prints_the_models_limits_and_ports(workers: int, model_dir: Path) -> None:
    code, lines, _ = run_check(f"--model_dir={model_dir}", f"--workers={workers}")

    assert (code, lines) == (
        0,
        [
            "custom-model: architecture alexnet, weights seeded:0, precision fp32, device cpu",
            LIMITS,
            "check passed: a start would listen on HTTP port 8080 and gRPC port 8081",
        ],
    )


def test_a_start_logs_the_same_summary(model_dir: Path) -> None:
    with run_server(f"--model_dir={model_dir}") as server:
        server.wait_for_line(re.compile("custom-model: architecture alexnet, weights seeded:0, precision fp32"))
        server.wait_for_line(re.compile(LIMITS))


def test_check_opens_no_port(server: Server) -> None:
    code, lines, _ = run_check(ECHO, f"--http_port={server.http_port}", "--enable_grpc=false")

    assert (code, lines[-1]) == (0, f"check passed: a start would listen on HTTP port {server.http_port}")


def test_check_fails_if_any_model_does_not_load(tmp_path: Path) -> None:
    code, lines, problem = run_check(
        f"--model=good=,bad={tmp_path}/none", "--predictor=good=tests.support.predictors:Echo"
    )

    assert (code, lines) == (4, [])
    assert problem == f"pinnace: the path of bad, {tmp_path}/none, does not exist: see --model_dir"


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
def test_check_ends_with_the_exit_code_of_a_failed_start(flags: list[str], code: int) -> None:
    found, lines, problem = run_check(*flags)

    assert (found, lines) == (code, [])
    assert problem.startswith("pinnace: ")


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_log_levels_are_coloured_on_a_terminal_unless_no_color_is_set(
    environment: dict[str, str], coloured: bool, model_dir: Path
) -> None:
    terminal, stderr = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}

    run_check(f"--model_dir={model_dir}", stderr=stderr, environment={**inherited, **environment})

    os.close(stderr)
    shown = os.read(terminal, 65536)
    os.close(terminal)
    assert b"UNTRAINED WEIGHTS" in shown
    assert (b"\033[33mWARNING\033[0m" in shown) == coloured
