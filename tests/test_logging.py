"""pinnace/observability/logging.py and access_log.py: log lines, formats, levels and KServe's configurations."""

from __future__ import annotations

import configparser
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import yaml

from tests.support.clients import call_grpc
from tests.support.servers import Server, expect_start_failure, run_server

ECHO = "--predictor=tests.support.predictors:Echo"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
PAYLOAD = "c2VjcmV0IHBheWxvYWQ"

# As in KServe's documentation: classes and loggers are uvicorn's.
KSERVE_CONFIGURATION: dict[str, Any] = {
    "version": 1,
    "formatters": {
        "default": {
            "()": "uvicorn.logging.DefaultFormatter",
            "fmt": "MINE %(levelprefix)s|%(name)s|%(message)s",
            "use_colors": None,
        },
        "access": {
            "()": "uvicorn.logging.AccessFormatter",
            "fmt": "MINE %(levelprefix)s|%(client_addr)s|%(request_line)s|%(status_code)s",
        },
    },
    "handlers": {
        "default": {"class": "logging.StreamHandler", "formatter": "default", "stream": "ext://sys.stderr"},
        "access": {"class": "logging.StreamHandler", "formatter": "access", "stream": "ext://sys.stdout"},
    },
    "loggers": {
        "": {"handlers": ["default"], "level": "INFO"},
        "uvicorn": {"handlers": ["default"], "level": "INFO"},
        "uvicorn.error": {"level": "INFO"},
        "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
    },
}
KSERVE_INI = """
[loggers]
keys=root,access
[handlers]
keys=default,access
[formatters]
keys=default,access
[logger_root]
level=INFO
handlers=default
[logger_access]
level=INFO
handlers=access
qualname=uvicorn.access
propagate=0
[handler_default]
class=StreamHandler
formatter=default
args=(sys.stderr,)
[handler_access]
class=StreamHandler
formatter=access
args=(sys.stdout,)
[formatter_default]
class=uvicorn.logging.DefaultFormatter
format=MINE %(levelprefix)s|%(name)s|%(message)s
[formatter_access]
class=uvicorn.logging.AccessFormatter
format=MINE %(levelprefix)s|%(client_addr)s|%(request_line)s|%(status_code)s
"""


def run_and_read_output(
    tmp_path: Path, send_requests: Callable[[Server], Any], *flags: str, **environment: str
) -> tuple[list[str], list[str]]:
    """Run a server, send it requests, and return the lines of its standard output and standard error."""
    with (
        (tmp_path / "stdout").open("w") as file,
        run_server(ECHO, *flags, environment={**os.environ, **environment}, stdout=file) as server,
    ):
        send_requests(server)
        assert server.stop() == 0
    return (tmp_path / "stdout").read_text().splitlines(), [line.rstrip("\n") for line in server.log]


def make_calls_over_both_protocols(google: ModuleType) -> Callable[[Server], None]:
    """Return a function that sends a REST request that fails, and gRPC calls that succeed and fail on both ports."""

    def send_requests(server: Server) -> None:
        server.post("/v1/models/custom-model:predict?a=b%0Ac", json.dumps({"instances": [{"x": {"b64": PAYLOAD}}]}))
        for port in (server.grpc_port, server.http_port):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call_grpc(channel, google, "ServerLive", google.ServerLiveRequest())
                with pytest.raises(grpc.RpcError):
                    call_grpc(channel, google, "ModelReady", google.ModelReadyRequest(name="nope"))

    return send_requests


def test_every_request_of_either_protocol_is_a_line_on_standard_output(tmp_path: Path, google: ModuleType) -> None:
    lines, _ = run_and_read_output(tmp_path, make_calls_over_both_protocols(google))

    start = rf"{TIME} uvicorn\.access INFO:     127\.0\.0\.1:\d+ \d+ - "
    service = "/inference.GRPCInferenceService"
    for line, end in zip(
        lines,
        [
            '"POST /v1/models/custom-model:predict?a=b%0Ac HTTP/1.1" 400 Bad Request',
            f'"POST {service}/ServerLive HTTP/2" OK',
            f'"POST {service}/ModelReady HTTP/2" NOT_FOUND',
            f'"POST {service}/ServerLive HTTP/2" OK',
            f'"POST {service}/ModelReady HTTP/2" NOT_FOUND',
        ],
        strict=True,
    ):
        assert re.fullmatch(start + re.escape(end), line), line


def test_log_messages_are_on_standard_error_in_kserves_format(tmp_path: Path) -> None:
    _, lines = run_and_read_output(tmp_path, lambda server: server.get("/"))

    for line in lines:
        assert re.match(rf"{TIME} \d+ [\w.]+ (INFO|WARNING) \[\w+\.py:\w+\(\):\d+\] ", line), line


def test_no_part_of_a_body_is_logged(tmp_path: Path, google: ModuleType) -> None:
    for flags in ([], ["--log_format=json"], ["--access_log_format=%(request_line)s %({content-type}i)s"]):
        out, err = run_and_read_output(
            tmp_path, make_calls_over_both_protocols(google), *flags, KSERVE_LOGLEVEL="debug"
        )
        assert not [line for line in out + err if PAYLOAD in line or "secret" in line]


# The example of the tutorial, which shows it as JSON, as YAML and as a dictionary.
SECOND = "%Y-%m-%d %H:%M:%S"
TUTORIALS_FORMATS = {
    "kserve": "%(asctime)s.%(msecs)03d %(filename)s:%(funcName)s():%(lineno)s %(message)s",
    "kserve_trace": "%(asctime)s.%(msecs)03d %(name)s %(message)s",
    "uvicorn": "%(asctime)s.%(msecs)03d %(name)s %(levelprefix)s %(message)s",
}
TUTORIALS_CONFIGURATION: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        name: {"()": "logging.Formatter", "fmt": form, "datefmt": SECOND} for name, form in TUTORIALS_FORMATS.items()
    },
    "handlers": {
        name: {"formatter": name, "class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
        for name in TUTORIALS_FORMATS
    },
    "loggers": {
        name: {"handlers": [name.replace(".", "_")], "level": "INFO", "propagate": False}
        for name in ("kserve", "kserve.trace", "uvicorn")
    },
}
TUTORIALS_CONFIGURATION["formatters"]["uvicorn"] |= {"()": "uvicorn.logging.DefaultFormatter", "use_colors": None}


@pytest.mark.parametrize("form", ["json", "yaml", "dictionary"])
def test_the_tutorials_configuration_is_applied(form: str, tmp_path: Path) -> None:
    file = tmp_path / f"logging.{form}"
    file.write_text((yaml.safe_dump if form == "yaml" else json.dumps)(TUTORIALS_CONFIGURATION))
    flag = (
        f"--log_config_file={file}"
        if form != "dictionary"
        else "--predictor=tests.support.predictors:ConfiguresLogging"
    )

    def send_requests(server: Server) -> None:
        server.predict('{"instances": [1]}')

    out, err = run_and_read_output(tmp_path, send_requests, flag, TEST_LOGGING=json.dumps(TUTORIALS_CONFIGURATION))

    assert out == []  # this configuration sends the access log to standard error
    for start in (
        r"server\.py:_serve\(\):\d+ ready after ",
        r"kserve\.trace requestId: N\.A\., preprocess_ms: ",
        r'uvicorn\.access INFO:     127\.0\.0\.1:\d+ - "POST /v1/models/custom-model:predict HTTP/1\.1" 200',
        r"server\.py:_serve\(\):\d+ stopped",
    ):
        assert [line for line in err if re.match(rf"{TIME} {start}", line)], start
    assert all(re.match(TIME, line) for line in err[1:])


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".ini", ".conf"])
def test_a_configuration_written_for_kserve_works_unchanged(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"logging{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(KSERVE_CONFIGURATION))
    elif suffix.startswith(".y"):
        file.write_text(yaml.safe_dump(KSERVE_CONFIGURATION))
    else:
        file.write_text(KSERVE_INI)

    out, err = run_and_read_output(tmp_path, lambda server: server.get("/v1/models"), f"--log_config_file={file}")

    assert len(out) == 1
    assert re.fullmatch(r"MINE INFO:    \|127\.0\.0\.1:\d+\|GET /v1/models HTTP/1\.1\|200 OK", out[0])
    assert re.match(r"MINE INFO:    \|pinnace\.process\.server\|ready after", err[0])
    assert err[-1] == "MINE INFO:    |pinnace.process.server|stopped"


def test_an_access_log_format_has_asgi_loggers_atoms(tmp_path: Path) -> None:
    atoms = ["h", "m", "U", "q", "H", "s", "st", "status_code", "request_line", "r", "R", "b", "B", "p", "a", "f", "l",
             "{x-mine}i", "{X-Mine}i", "{content-type}o", "{PINNACE_TEST}e", "{absent}i", "nonsense"]  # fmt: skip
    form = "|".join(f"%({atom})s" for atom in atoms)

    def send_requests(server: Server) -> None:
        server.post("/v1/models?a=1", "{}", x_mine="yes", user_agent="tester")

    (line,), _ = run_and_read_output(tmp_path, send_requests, f"--access_log_format={form}", PINNACE_TEST="here")

    found = dict(zip(atoms, line.split("|"), strict=True))
    pid = found.pop("p")
    assert re.fullmatch(r"<\d+>", pid)
    assert found == {
        "h": "127.0.0.1",
        "m": "POST",
        "U": "/v1/models",
        "q": "a=1",
        "H": "HTTP/1.1",
        "s": "405",
        "st": "Method Not Allowed",
        "status_code": "405 Method Not Allowed",
        "request_line": "POST /v1/models?a=1 HTTP/1.1",
        "r": "POST /v1/models HTTP/1.1",
        "R": "POST /v1/models?a=1 HTTP/1.1",
        "b": "30",
        "B": "30",
        "a": "tester",
        "f": "-",
        "l": "-",
        "{x-mine}i": "yes",
        "{X-Mine}i": "yes",
        "{content-type}o": "application/json",
        "{PINNACE_TEST}e": "here",
        "{absent}i": "-",
        "nonsense": "-",
    }


def test_times_of_a_request_are_in_seconds_milliseconds_and_microseconds(tmp_path: Path) -> None:
    form = "%(T)s %(M)s %(D)s %(L)s"

    (line,), _ = run_and_read_output(tmp_path, lambda server: server.get("/"), f"--access_log_format={form}")

    seconds, milliseconds, microseconds, decimal = line.split()
    assert int(seconds) == int(milliseconds) // 1000 == int(microseconds) // 1_000_000
    assert float(decimal) == pytest.approx(int(microseconds) / 1e6, abs=2e-6)


def test_json_has_one_object_per_line(tmp_path: Path, google: ModuleType) -> None:
    out, err = run_and_read_output(tmp_path, make_calls_over_both_protocols(google), "--log_format=json")

    entries = [json.loads(line) for line in out + err]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(entry) for entry in entries))
    assert len([entry for entry in entries if entry["logger"] == "uvicorn.access"]) == 5
    assert entries[-1]["message"] == "stopped"


def test_an_exception_is_on_the_same_json_line(tmp_path: Path) -> None:
    body = json.dumps({"instances": ["RuntimeError"]})
    with run_server("--predictor=tests.support.predictors:Failing", "--log_format=json") as server:
        server.predict(body)
        server.stop()

    (entry,) = [entry for line in server.log if "exception" in (entry := json.loads(line))]
    assert (entry["level"], entry["message"]) == ("ERROR", "request N.A. failed")
    assert entry["exception"].endswith("RuntimeError: the secret of the text")


def test_every_inference_logs_the_time_of_each_handler(tmp_path: Path) -> None:
    body = json.dumps({"instances": [1]})

    _, lines = run_and_read_output(
        tmp_path, lambda server: [server.predict(body), server.predict(body, x_request_id="mine")]
    )

    number = r"[\d.e-]+"
    line = rf"preprocess_ms: {number}, explain_ms: 0, predict_ms: {number}, postprocess_ms: {number}"
    first, second = (line for line in lines if "kserve.trace" in line)
    assert re.fullmatch(rf"{TIME} \d+ kserve\.trace requestId: N\.A\., {line}", first)
    assert re.fullmatch(rf"{TIME} \d+ kserve\.trace requestId: mine, {line}", second)


def test_without_the_flag_no_latencies_are_logged(tmp_path: Path) -> None:
    body = json.dumps({"instances": [1]})

    _, lines = run_and_read_output(tmp_path, lambda server: server.predict(body), "--enable_latency_logging=false")

    assert not [line for line in lines if "kserve.trace" in line]


def test_a_request_id_is_in_every_response_and_in_its_log_lines(tmp_path: Path, google: ModuleType) -> None:
    answers: list[Any] = []

    def send_requests(server: Server) -> None:
        for body in (json.dumps({"instances": [1]}), "{"):
            answers.append(server.predict(body, x_request_id="mine").headers["x-request-id"])
        for port in (server.grpc_port, server.http_port):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                    "/inference.GRPCInferenceService/ServerLive"
                )
                _, done = call.with_call(b"", timeout=10, metadata=(("x-request-id", "mine"),))
                metadata = [*(done.initial_metadata() or ()), *(done.trailing_metadata() or ())]
                answers.append(dict(metadata)["x-request-id"])
        assert "x-request-id" not in server.get("/").headers

    out, err = run_and_read_output(tmp_path, send_requests, "--log_format=json")

    assert answers == ["mine"] * 4
    entries = [json.loads(line) for line in out + err]
    assert [entry["logger"] for entry in entries if entry.get("request_id") == "mine"] == [
        *["uvicorn.access"] * 4,
        "kserve.trace",
    ]


@pytest.mark.parametrize(
    "flags",
    [[], ["--log_format=json"], ["--access_log_format=%(r)s %({x-request-id}i)s"], ["--log_config_file={file}"]],
)
def test_a_header_cannot_split_a_log_line_or_command_a_terminal(flags: list[str], tmp_path: Path) -> None:
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(TUTORIALS_CONFIGURATION))
    body = b'{"instances": ["a"]}'
    head = b"POST /v1/models/custom-model:predict HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(body)

    def send_requests(server: Server) -> None:
        with server.connect() as connection:
            connection.sendall(head + b"x-request-id: a\x85b\x9b31m\r\nconnection: close\r\n\r\n" + body)
            while connection.recv(65536):
                pass

    out, err = run_and_read_output(tmp_path, send_requests, *[flag.replace("{file}", str(file)) for flag in flags])

    assert all(line.isprintable() for line in out + err)
    assert [line for line in out + err if r"\x85b" in line and r"\x9b31m" in line]


def test_a_failure_is_logged_with_its_request_id() -> None:
    with run_server("--predictor=tests.support.predictors:Failing") as server:
        server.predict(json.dumps({"instances": ["RuntimeError"]}), x_request_id="mine")
        server.stop()

    assert [line for line in server.log if line.endswith("request mine failed\n")]


def test_the_level_is_set_by_kserves_variable(tmp_path: Path) -> None:
    _, quiet = run_and_read_output(tmp_path, lambda server: server.get("/"))
    assert [line for line in quiet if "stopped" in line]

    code, lines = expect_start_failure(ECHO, "--http_port=0", environment={**os.environ, "KSERVE_LOGLEVEL": "loud"})
    assert code == 2
    assert lines == ["pinnace: KSERVE_LOGLEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not LOUD"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent.json", None),
        ("bad.json", "{"),
        ("bad.yaml", "a: [b"),
        ("bad.ini", "[loggers]"),
        ("odd.json", '{"version": 9}'),
    ],
)
def test_a_configuration_that_cannot_be_used_stops_the_start_with_one_line(
    name: str, text: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)

    code, lines = expect_start_failure(ECHO, f"--log_config_file={tmp_path / name}")

    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"pinnace: --log_config_file={tmp_path / name} cannot be used: ")


def test_the_ini_of_these_tests_is_valid() -> None:
    parser = configparser.RawConfigParser()
    parser.read_string(KSERVE_INI)

    assert parser["formatter_access"]["class"] == "uvicorn.logging.AccessFormatter"
