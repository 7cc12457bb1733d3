"""pinnace/process/flags.py and cli.py: the commands, where each setting comes from, and what stops the start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pinnace.errors import ConfigurationError
from pinnace.process.flags import environment_variable, parse_settings, warn_of_unknown_variables
from pinnace.process.sockets import SOCKETS_ENV
from pinnace.settings import GROUPS, Settings
from pinnace.version import __version__
from tests.support.servers import PROJECT, run_server


def test_without_flags_and_environment_every_setting_has_its_default() -> None:
    assert parse_settings([], {}) == Settings()


def test_a_flag_may_be_written_with_dashes_or_underscores() -> None:
    assert parse_settings(["--http-port=90"], {}) == parse_settings(["--http_port", "90"], {}) == Settings(http_port=90)


@pytest.mark.parametrize("name", [entry.name for entry in fields(Settings)])
def test_every_flag_has_an_environment_twin_that_it_overrules(name: str) -> None:
    text, other = {
        "model_name": ("a", "b"),
        "model_dir": ("/a", "/b"),
        "model": ("a=/a,b=/b", "c="),
        "predictor": ("a:B", "b:C"),
        "host": ("127.0.0.1", "::1"),
        "device": ("cpu", "cuda"),
        "engine": ("ray", "local"),
        "ray_actor_options": ('{"num_cpus": 2}', '{"num_gpus": 0.5}'),
        "autoscaling_config": ('{"max_replicas": 2}', "{}"),
        "gpu_memory_percent": ("50", "60"),
        "drain_delay_seconds": ("1", "2"),
        "protocol": ("v1", "v2"),
        "event_loop": ("asyncio", "uvloop"),
        "log_format": ("json", "text"),
    }.get(name, ("false", "true") if isinstance(getattr(Settings(), name), bool) else ("123", "231"))

    # Each of these two flags needs the other.
    tls = {environment_variable(flag): "/tls" for flag in ("ssl_certfile", "ssl_keyfile")}
    twin = {**tls, environment_variable(name): text}

    assert parse_settings([], twin) == parse_settings([f"--{name}={text}"], tls)
    assert parse_settings([f"--{name}={other}"], twin) == parse_settings([f"--{name}={other}"], tls)


def test_what_may_be_several_is_repeated_or_separated_by_commas() -> None:
    assert (
        parse_settings(["--model=a=/a", "--model", "b=/b"], {})
        == parse_settings(["--model=a=/a,b=/b"], {})
        == parse_settings([], {"PINNACE_MODEL": "a=/a,b=/b"})
        == Settings(model=("a=/a", "b=/b"))
    )


def test_an_empty_environment_variable_is_no_setting() -> None:
    assert (
        parse_settings([], {"PINNACE_HTTP_PORT": "", "PINNACE_MODEL_DIR": "", "PORT": "", "K_SERVICE": ""})
        == Settings()
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "http_port", "grpc_port"),
    [
        ([], {"PORT": "9000"}, 9000, 8081),
        ([], {"PORT": "8080"}, 8080, 8081),
        ([], {"PORT": "8081"}, 8080, 8081),  # docker run -ePORT=8081 -p8081:8081 publishes gRPC's
        (["--grpc_port=9000"], {"PORT": "9000"}, 8080, 9000),
        ([], {"PORT": "9000", "PINNACE_GRPC_PORT": "9000"}, 8080, 9000),
        (["--http_port=9001"], {"PORT": "9000"}, 9001, 8081),
        ([], {"PORT": "9000", "PINNACE_HTTP_PORT": "9001"}, 9001, 8081),
        (["--enable_grpc=false"], {"PORT": "8081"}, 8081, 8081),  # without gRPC it has no port
        (["--http_port=8081"], {"PINNACE_ENABLE_GRPC": "no"}, 8081, 8081),
    ],
)
def test_port_moves_rest_unless_it_is_the_grpc_port_or_a_setting_says_otherwise(
    arguments: list[str], environment: dict[str, str], http_port: int, grpc_port: int
) -> None:
    settings = parse_settings(arguments, environment)

    assert (settings.http_port, settings.grpc_port) == (http_port, grpc_port)


# Its flags and their defaults, from its parser; beside those that are not the same here, why.
KSERVES_FLAGS = {
    "http_port": "8080",
    "grpc_port": "8081",
    "workers": "1",
    "max_threads": "4",  # without effect there as well
    "max_asyncio_workers": "0",  # None there, and without effect; here threads that decode
    "enable_grpc": "true",
    "enable_docs_url": "false",
    "enable_latency_logging": "true",
    "configure_logging": "true",
    "log_config_file": "",
    "access_log_format": "",
    "event-loop": "auto",
    "timeout-keep-alive": "65",
    "model_name": "custom-model",  # "model" there: the tutorial's Procfile and requests say custom-model
    "protocol": "",  # v1 there, deprecated and unused
    "grpc_max_send_message_length": "8388608",
    "grpc_max_receive_message_length": "8388608",
}


@pytest.mark.parametrize("flag", KSERVES_FLAGS)
def test_kserves_flag_is_taken_with_its_default(flag: str) -> None:
    default = KSERVES_FLAGS[flag]

    assert parse_settings([f"--{flag}={default}"] if default else [], {}) == Settings()


@pytest.mark.parametrize(
    "flag",
    [
        "--predictor_host=a",
        "--predictor_protocol=v2",
        "--predictor_use_ssl=true",
        "--predictor_request_timeout_seconds=600",
        "--predictor_request_retries=0",
        "--enable_predictor_health_check",
    ],
)
def test_kserves_flag_for_transformers_is_refused_and_explained(flag: str) -> None:
    """Its server takes them and, without a transformer's code, does nothing with them."""
    with pytest.raises(ConfigurationError, match="are for transformers, and this is no transformer"):
        parse_settings([flag], {})


@pytest.mark.parametrize(
    ("variable", "text", "setting"),
    [
        (
            "PORT",
            "9000",
            "http_port",
        ),  # KServe's server reads neither of the first two: the tutorial's commands set them
        ("PROTOCOL", "v2", "protocol"),
        ("CE_MERGE", "true", "ce_merge"),
        ("CE_TYPE", "a.b", "ce_type"),
        ("CE_SOURCE", "a.b", "ce_source"),
    ],
)
def test_kserves_variable_is_taken(variable: str, text: str, setting: str) -> None:
    """KSERVE_LOGLEVEL is in test_logging; STORAGE_URI comes with storage."""
    assert parse_settings([], {variable: text}) == parse_settings([f"--{setting}={text}"], {})


@pytest.mark.parametrize("text", ["v1", "V1", "V2", "grpc-v2"])
def test_the_protocol_that_kserve_names_may_be_in_any_case(text: str) -> None:
    assert parse_settings([], {"PROTOCOL": text}).protocol == text.lower()


@pytest.mark.parametrize(
    ("service", "name"),
    [
        ("flowers", "flowers"),
        ("flowers-predictor", "flowers"),
        ("flowers-predictor-default", "flowers"),
        ("flowers-predictor-00001", "flowers"),
    ],
)
def test_on_knative_the_model_is_named_after_the_service(service: str, name: str) -> None:
    assert parse_settings([], {"K_SERVICE": service}).model_name == name


def test_a_model_name_of_ones_own_overrules_the_service() -> None:
    assert parse_settings(["--model_name=roses"], {"K_SERVICE": "flowers-predictor"}).model_name == "roses"


@pytest.mark.parametrize("text", ["y", "Yes", "t", "TRUE", "on", "1"])
def test_a_switch_is_thrown_by_every_word_that_kserve_takes(text: str) -> None:
    assert parse_settings([f"--enable_grpc_reflection={text}"], {}).enable_grpc_reflection is True


@pytest.mark.parametrize("text", ["n", "No", "f", "FALSE", "off", "0"])
def test_a_switch_is_undone_by_every_word_that_kserve_takes(text: str) -> None:
    environment = {"PINNACE_ENABLE_GRPC_REFLECTION": text}

    assert parse_settings([], environment).enable_grpc_reflection is False


def test_the_model_dir_is_a_path() -> None:
    assert parse_settings(["--model_dir=a/b"], {}).model_dir == Path("a/b")


@pytest.mark.parametrize(
    ("arguments", "environment", "problem"),
    [
        (["--no_such_flag=1"], {}, "unknown flag --no_such_flag (--help lists the flags)"),
        (["--http"], {}, "unknown flag --http, did you mean --http_port? (--help lists the flags)"),
        (
            ["--max-batchsize=4"],
            {},
            "unknown flag --max-batchsize, did you mean --max_batch_size? (--help lists the flags)",
        ),
        (["--chek"], {}, "unknown flag --chek, did you mean --check? (--help lists the flags)"),
        (["model"], {}, "unexpected argument model: a flag is written --flag=value (--help lists the flags)"),
        (["--http_port"], {}, "argument --http_port: expected one argument (--help lists the flags)"),
        (["--http_port=eighty"], {}, "--http_port must be a whole number, not eighty"),
        (["--http_port=65536"], {}, "--http_port must lie between 0 and 65535, not 65536"),
        ([], {"PINNACE_HTTP_PORT": "-1"}, "PINNACE_HTTP_PORT must lie between 0 and 65535, not -1"),
        ([], {"PORT": "tcp://10.0.0.1:80"}, "PORT must be a whole number, not tcp://10.0.0.1:80"),
        ([], {"PROTOCOL": "v3"}, "PROTOCOL must be one of v1, v2, grpc-v2, not v3"),
        (["--event_loop=trio"], {}, "--event_loop must be one of auto, asyncio, uvloop, not trio"),
        (["--enable_grpc_reflection=maybe"], {}, "--enable_grpc_reflection must be true or false, not maybe"),
        (["--access_log_format=%(h"], {}, "--access_log_format must be a %-format (incomplete format key), not %(h"),
        (["--device=gpu"], {}, "--device must be one of auto, cpu, cuda, not gpu"),
        (["--model_name=a/b"], {}, "--model_name must be a name without slash, colon or blank, not a/b"),
        (["--predictor=iris"], {}, "--predictor must be module:Class, or NAME=module:Class, not iris"),
        (["--model=a=/a", "--model=b"], {}, "--model must be NAME=DIR, the name without slash, colon or blank, not b"),
        (
            ["--drain_delay_seconds=25"],
            {},
            "--drain_delay_seconds is part of --grace_period_seconds, and must be smaller",
        ),
        (["--ray_actor_options=[]"], {}, "--ray_actor_options must be a JSON object, not []"),
        (["--autoscaling_config={"], {}, "--autoscaling_config must be a JSON object, not {"),
        (
            ["--workers=2", "--engine=ray"],
            {},
            "--engine=ray needs --workers=1: its replicas are the workers, see --num_replicas",
        ),
        (["--max_connections=1000001"], {}, "--max_connections must lie between 1 and 1000000, not 1000001"),
        (["--max_instances=0"], {}, "--max_instances must lie between 1 and 2147483647, not 0"),
        (
            ["--workers=2", "--enable_model_repository=true"],
            {},
            "--enable_model_repository needs --workers=1: a client reaches one of several workers only",
        ),
        (
            ["--http_port=90", "--grpc_port=90"],
            {},
            "--http_port and --grpc_port are both 90: give each a port of its own",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line_that_names_its_source(
    arguments: list[str], environment: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_settings(arguments, environment)

    assert str(error.value) == problem


def test_help_shows_every_flag_once_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--help"], {})

    lines = capsys.readouterr().out.splitlines()
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags == ["--version", "--check", *(f"--{entry.name}" for entry in fields(Settings))]
    assert [line for line in lines if line in {f"{title}:" for title in GROUPS.values()}] == [
        f"{title}:" for title in GROUPS.values()
    ]


@pytest.mark.parametrize("value", ["tcp://10.0.0.1:80", "udp://10.0.0.1:53"])
def test_an_address_that_kubernetes_injects_for_a_service_is_no_setting(value: str) -> None:
    """A Service named pinnace-http sets PINNACE_HTTP_PORT to one, and pinnace-grpc PINNACE_GRPC_PORT."""
    environment = {"PINNACE_HTTP_PORT": value, "PINNACE_GRPC_PORT": value, "PINNACE_MODEL_DIR": value}

    assert parse_settings([], environment) == Settings()


def test_an_address_that_kubernetes_injects_leaves_the_platforms_own_variable_in_force() -> None:
    assert parse_settings([], {"PINNACE_HTTP_PORT": "tcp://10.0.0.1:80", "PORT": "9000"}).http_port == 9000


def test_an_unknown_variable_is_warned_of_with_the_nearest_setting(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unknown_variables({"PINNACE_MAX_BATCHSIZE": "8", "PINNACE_MODEL_DIR": "a", "OTHER": "", "PINNACE_": ""})

    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "PINNACE_ is unknown and ignored" in caplog.messages[0]
    assert caplog.messages[1] == (
        "the environment variable PINNACE_MAX_BATCHSIZE is unknown and ignored: the nearest is PINNACE_MAX_BATCH_SIZE"
    )


def test_variables_of_services_and_of_our_own_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    services = {
        "PINNACE_SERVICE_HOST": "10.0.0.1",
        "PINNACE_SERVICE_PORT_HTTP": "80",
        "PINNACE_PORT": "tcp://10.0.0.1:80",
        "PINNACE_PORT_80_TCP_ADDR": "10.0.0.1",
        "PINNACE_HTTP_SERVICE_HOST": "10.0.0.2",
        "PINNACE_HTTP_SERVICE_PORT": "80",
        "PINNACE_HTTP_PORT": "tcp://10.0.0.2:80",
        "PINNACE_HTTP_PORT_80_TCP": "tcp://10.0.0.2:80",
        "PINNACE_HTTP_PORT_80_TCP_PROTO": "tcp",
        "PINNACE_PREDICTOR": "tcp://10.0.0.3:80",
    }
    code = "".join(file.read_text() for file in (PROJECT / "pinnace").rglob("*.py"))
    ours = dict.fromkeys(re.findall(r"\"(PINNACE_[A-Z_]+)\"", code), "1")

    warn_of_unknown_variables(services)
    warn_of_unknown_variables({name: value for name, value in ours.items() if name != SOCKETS_ENV})

    assert {SOCKETS_ENV, "PINNACE_SHARED_WEIGHTS_DIR"} <= ours.keys()
    assert caplog.messages == []


def test_a_start_warns_of_an_unknown_variable_once_whatever_the_number_of_workers() -> None:
    with run_server(
        "--predictor=tests.support.predictors:Echo",
        "--workers=2",
        environment={**os.environ, "PINNACE_MODEL_DIRS": "a", "PINNACE_PORT_80_TCP": "tcp://10.0.0.1:80"},
    ) as server:
        assert server.stop() == 0

    warnings = [line for line in server.log if "is unknown and ignored" in line]
    assert len(warnings) == 1
    assert "PINNACE_MODEL_DIRS is unknown and ignored: the nearest is PINNACE_MODEL_DIR\n" in warnings[0]


COMMANDS = {
    "app.py": [sys.executable, "app.py"],
    "pinnace serve": [sys.executable, "-m", "pinnace", "serve"],
    "pinnace check": [sys.executable, "-m", "pinnace", "check"],
}


def run(*command: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_calls_itself_as_it_was_started(name: str) -> None:
    code, shown, _ = run(*COMMANDS[name], "--help")

    assert code == 0
    assert shown.startswith(f"usage: {'python ' * (name == 'app.py')}{name} [--flag=value …]\n")


@pytest.mark.parametrize("arguments", [["--version"], ["serve", "--version"], ["check", "--version"]])
def test_the_command_and_the_module_print_the_version(arguments: list[str]) -> None:
    assert run(sys.executable, "-m", "pinnace", *arguments) == (0, f"{__version__}\n", "")


def test_the_help_of_the_command_lists_its_commands() -> None:
    code, shown, _ = run(sys.executable, "-m", "pinnace", "--help")

    assert code == 0
    assert re.findall(r"^  (\w+)  ", shown, re.MULTILINE) == ["serve", "check", "export"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "a command is missing (--help lists the commands)"),
        (["server"], "unknown command server, did you mean serve? (--help lists the commands)"),
        (["frobnicate"], "unknown command frobnicate (--help lists the commands)"),
        (
            ["--http_port=1"],
            "a command must come first, as in `pinnace serve --http_port=1` (--help lists the commands)",
        ),
        (["serve", "--htp_port=1"], "unknown flag --htp_port, did you mean --http_port? (--help lists the flags)"),
        (["check", "--workers=no"], "--workers must be a whole number, not no"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2_and_one_line(arguments: list[str], problem: str) -> None:
    assert run(sys.executable, "-m", "pinnace", *arguments) == (2, "", f"pinnace: {problem}\n")


def test_check_says_what_serve_would_serve() -> None:
    as_command = run(sys.executable, "-m", "pinnace", "check", "--predictor=tests.support.predictors:Echo")
    as_flag = run(sys.executable, "app.py", "--check", "--predictor=tests.support.predictors:Echo")

    assert as_command == as_flag
    assert as_command[0] == 0
    assert as_command[1].startswith("custom-model: ready\n")


def test_export_takes_the_flags_of_model_export_under_its_own_name() -> None:
    code, shown, _ = run(sys.executable, "-m", "pinnace", "export", "--help")

    assert code == 0
    assert shown.startswith("usage: pinnace export ")
    assert "--weights" in shown


def test_a_wrong_flag_of_an_export_ends_with_exit_code_2_and_one_line() -> None:
    code, _, said = run(sys.executable, "-m", "pinnace", "export", "--precision=fp64")

    assert (code, len(said.splitlines())) == (2, 1)
    assert said.startswith("pinnace: argument --precision: invalid choice: 'fp64'")
