"""serving/settings.py: where each setting comes from, and what stops the start."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from serving.errors import BadSetting
from serving.settings import Settings, environment_variable, parse_settings


def test_without_flags_and_environment_every_setting_has_its_default() -> None:
    assert parse_settings([], {}) == Settings()


def test_a_flag_may_be_written_with_dashes_or_underscores() -> None:
    assert parse_settings(["--http-port=90"], {}) == parse_settings(["--http_port", "90"], {}) == Settings(http_port=90)


@pytest.mark.parametrize("name", [entry.name for entry in fields(Settings)])
def test_every_flag_has_an_environment_twin_that_it_overrules(name: str) -> None:
    text, other = {
        "model_name": ("a", "b"),
        "model_dir": ("/a", "/b"),
        "predictor": ("a:B", "b:C"),
        "host": ("127.0.0.1", "::1"),
        "device": ("cpu", "cuda"),
        "protocol": ("v1", "v2"),
        "event_loop": ("asyncio", "uvloop"),
        "log_format": ("json", "text"),
    }.get(name, ("false", "true") if isinstance(getattr(Settings(), name), bool) else ("123", "321"))

    assert parse_settings([], {environment_variable(name): text}) == parse_settings([f"--{name}={text}"], {})
    assert parse_settings([f"--{name}={other}"], {environment_variable(name): text}) == parse_settings(
        [f"--{name}={other}"], {}
    )


def test_an_empty_environment_variable_is_no_setting() -> None:
    assert (
        parse_settings([], {"SERVING_HTTP_PORT": "", "SERVING_MODEL_DIR": "", "PORT": "", "K_SERVICE": ""})
        == Settings()
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "http_port", "grpc_port"),
    [
        ([], {"PORT": "9000"}, 9000, 8081),
        ([], {"PORT": "8080"}, 8080, 8081),
        ([], {"PORT": "8081"}, 8080, 8081),  # docker run -ePORT=8081 -p8081:8081 publishes gRPC's
        (["--grpc_port=9000"], {"PORT": "9000"}, 8080, 9000),
        ([], {"PORT": "9000", "SERVING_GRPC_PORT": "9000"}, 8080, 9000),
        (["--http_port=9001"], {"PORT": "9000"}, 9001, 8081),
        ([], {"PORT": "9000", "SERVING_HTTP_PORT": "9001"}, 9001, 8081),
    ],
)
def test_port_moves_rest_unless_it_is_the_grpc_port_or_a_setting_says_otherwise(
    arguments: list[str], environment: dict[str, str], http_port: int, grpc_port: int
) -> None:
    settings = parse_settings(arguments, environment)

    assert (settings.http_port, settings.grpc_port) == (http_port, grpc_port)


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
    environment = {"SERVING_ENABLE_GRPC_REFLECTION": text}

    assert parse_settings([], environment).enable_grpc_reflection is False


def test_the_model_dir_is_a_path() -> None:
    assert parse_settings(["--model_dir=a/b"], {}).model_dir == Path("a/b")


@pytest.mark.parametrize(
    ("arguments", "environment", "problem"),
    [
        (["--no_such_flag=1"], {}, "unrecognized arguments: --no_such_flag=1 (--help lists the flags)"),
        (
            ["--predictor-host=other"],
            {},
            "unrecognized arguments: --predictor-host=other (KServe's --predictor_* flags and "
            "--enable_predictor_health_check are for transformers: this is none.)",
        ),
        (["--http"], {}, "unrecognized arguments: --http (--help lists the flags)"),
        (["--http_port"], {}, "argument --http_port/--http-port: expected one argument (--help lists the flags)"),
        (["--http_port=eighty"], {}, "--http_port must be a whole number, not eighty"),
        (["--http_port=65536"], {}, "--http_port must lie between 0 and 65535, not 65536"),
        ([], {"SERVING_HTTP_PORT": "-1"}, "SERVING_HTTP_PORT must lie between 0 and 65535, not -1"),
        ([], {"PORT": "tcp://10.0.0.1:80"}, "PORT must be a whole number, not tcp://10.0.0.1:80"),
        ([], {"PROTOCOL": "v3"}, "PROTOCOL must be one of v1, v2, grpc-v2, not v3"),
        (["--event_loop=trio"], {}, "--event_loop must be one of auto, asyncio, uvloop, not trio"),
        (["--enable_grpc_reflection=maybe"], {}, "--enable_grpc_reflection must be true or false, not maybe"),
        (["--access_log_format=%(h"], {}, "--access_log_format must be a format for %: incomplete format key, not %(h"),
        (["--device=gpu"], {}, "--device must be one of auto, cpu, cuda, not gpu"),
        (["--model_name=a/b"], {}, "--model_name must be a name without slash, colon or blank, not a/b"),
        (["--predictor=iris"], {}, "--predictor must be module:Class, not iris"),
        (["--max_instances=0"], {}, "--max_instances must lie between 1 and 2147483647, not 0"),
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
    with pytest.raises(BadSetting) as error:
        parse_settings(arguments, environment)

    assert str(error.value) == problem
