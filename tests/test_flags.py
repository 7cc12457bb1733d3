"""pinnace/command_line.py: where each setting comes from, and what stops the start."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from pinnace.errors import ConfigurationError
from pinnace.process.flags import environment_variable, parse_settings
from pinnace.settings import GROUPS, Settings


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

    beside = {environment_variable(one): "/beside" for one in ("ssl_certfile", "ssl_keyfile")}  # none goes alone
    twin = {**beside, environment_variable(name): text}

    assert parse_settings([], twin) == parse_settings([f"--{name}={text}"], beside)
    assert parse_settings([f"--{name}={other}"], twin) == parse_settings([f"--{name}={other}"], beside)


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
    with pytest.raises(ConfigurationError, match="are for transformers: this is none"):
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
        (["--no_such_flag=1"], {}, "unrecognized arguments: --no_such_flag=1 (--help lists the flags)"),
        (["--http"], {}, "unrecognized arguments: --http (--help lists the flags)"),
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
