"""Every setting once: its flag, environment variable, default, range and help all come from one table, Settings.

A flag wins over its environment variable, that over the platform's own (PORT, K_SERVICE), that over the default.
Environment variables matter because in a buildpack image arguments replace the Procfile's whole line.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from serving import __version__
from serving.errors import BadSetting

ENVIRONMENT_PREFIX = "SERVING_"  # bare names would clash: Kubernetes sets HTTP_PORT=tcp://… for a service named http
MIB = 1024 * 1024
KSERVE_VARIABLES = ("protocol", "ce_type", "ce_source", "ce_merge")  # known under their bare names
BOOLEANS = dict.fromkeys(("y", "yes", "t", "true", "on", "1"), True) | dict.fromkeys(
    ("n", "no", "f", "false", "off", "0"), False
)  # as KServe's flags take them

TRANSFORMERS = "KServe's --predictor_* flags and --enable_predictor_health_check are for transformers: this is none."

Check = Callable[[Any], str | None]


def _between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must lie between {low} and {high}"


def _one_of(*choices: str) -> Check:
    return lambda value: None if value in choices else f"must be one of {', '.join(choices)}"


def _matches(pattern: str, what: str) -> Check:
    return lambda value: None if re.fullmatch(pattern, value) else f"must be {what}"


def _is_format(text: str) -> str | None:
    try:
        text % defaultdict(int)
    except (ValueError, TypeError) as error:
        return f"must be a format for %: {error}"
    return None


def _setting(default: Any, help_text: str, check: Check | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "check": check})


_port = _between(0, 65535)
_positive = _between(1, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server was started with; units are in the names."""

    model_name: str = _setting(
        "custom-model",
        "name that clients call the model by; on Knative the service's name is the default",
        _matches(r"[^/:\s]+", "a name without slash, colon or blank"),
    )
    model_dir: Path | None = _setting(
        None, "directory of the exported model, or its .onnx file; else /mnt/models, else model/ beside app.py"
    )
    predictor: str = _setting(
        "serving.classifier:Classifier",
        "class that turns requests into rows and predictions into answers, as module:Class",
        _matches(r"[\w.]+:\w+", "module:Class"),
    )
    host: str = _setting("", "address to listen on; empty means every interface, IPv4 and IPv6")
    http_port: int = _setting(8080, "port of REST; 0 takes a free one; PORT in the environment is the default", _port)
    grpc_port: int = _setting(8081, "port of gRPC; 0 takes a free one", _port)
    enable_grpc: bool = _setting(True, "true or false; without it there is no gRPC port, and no gRPC on the HTTP port")
    protocol: str = _setting(
        "", "v1, v2 or grpc-v2, as KServe's PROTOCOL says it; checked and logged only, since all are served at once",
        _one_of("v1", "v2", "grpc-v2"),
    )  # fmt: skip
    cors_allow_origins: str = _setting(
        "", "web pages that may call, as origins separated by commas; * is every one, as in the tutorial; else none"
    )
    enable_docs_url: bool = _setting(
        False, "true or false; with it /docs shows the API to people, who can try it out there"
    )
    ce_type: str = _setting(
        "io.kserve.inference.response", "type of the CloudEvents that answer such; CE_TYPE in the environment as well"
    )
    ce_source: str = _setting(
        "", "their source; else io.kserve.inference. and the model's name; CE_SOURCE in the environment as well"
    )
    ce_merge: bool = _setting(
        False, "true or false; with it they take over the request's attributes; CE_MERGE in the environment as well"
    )
    enable_grpc_reflection: bool = _setting(
        False, "true or false; with it grpcurl and its like need no .proto files, and anybody may list the methods"
    )
    enable_model_repository: bool = _setting(
        False, "true or false; with it clients may unload a model, to free its memory, and load it again"
    )
    device: str = _setting(
        "auto", "auto, cpu or cuda; auto takes CUDA where it works, cuda stops the start where it does not",
        _one_of("auto", "cpu", "cuda"),
    )  # fmt: skip
    threads: int = _setting(0, "threads that run the model; 0 means one a CPU of the quota", _between(0, 1024))
    max_asyncio_workers: int = _setting(
        0, "threads that decode requests and encode answers; 0 means one a CPU of the quota", _between(0, 1024)
    )
    max_threads: int = _setting(
        4, "accepted for KServe's sake and without effect: gRPC takes no threads here", _between(1, 1024)
    )
    event_loop: str = _setting(
        "auto", "auto, asyncio or uvloop; auto is asyncio, uvloop must be installed beside the requirements",
        _one_of("auto", "asyncio", "uvloop"),
    )  # fmt: skip
    enable_latency_logging: bool = _setting(
        True, "true or false; a line an inference with the milliseconds of each handler, by the logger kserve.trace"
    )
    configure_logging: bool = _setting(
        True, "true or false; without it nothing is logged but by what a predictor configures"
    )
    log_config_file: Path | None = _setting(
        None, "configuration of Python's logging, .json, .yaml or .ini; those written for KServe work unchanged"
    )
    log_format: str = _setting("text", "text or json: lines for people or for machines", _one_of("text", "json"))
    access_log_format: str = _setting(
        "",
        "format of the line a request, as '%(h)s %(request_line)s %(s)s %(M)s', with asgi-logger's atoms",
        _is_format,
    )
    max_body_bytes: int = _setting(8 * MIB, "largest REST body; a larger one is answered 413", _positive)
    grpc_max_receive_message_length: int = _setting(
        8 * MIB, "largest gRPC request in bytes; a larger one is answered RESOURCE_EXHAUSTED", _positive
    )
    grpc_max_send_message_length: int = _setting(
        8 * MIB, "largest gRPC response in bytes; a larger one is answered RESOURCE_EXHAUSTED", _positive
    )
    max_image_pixels: int = _setting(
        50_000_000, "largest image, width times height; a larger one is answered 413 without being decoded", _positive
    )
    max_instances: int = _setting(128, "most rows in one request; more are answered 413", _positive)
    max_concurrent_requests: int = _setting(
        256, "most inference requests under way at once; one more is answered 503 at once", _positive
    )
    timeout_keep_alive: int = _setting(
        65, "seconds that an idle HTTP connection stays open; keep it above the idle timeout of the proxy in front",
        _positive,
    )  # fmt: skip
    grace_period_seconds: int = _setting(
        25, "seconds that a stopping server has to answer what it accepted; keep it below Kubernetes' 30", _positive
    )


def environment_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def default_text(default: Any) -> str:
    """A default as one would write it in a flag."""
    return str(default).lower() if isinstance(default, bool) else "" if default is None else str(default)


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Raises BadSetting; --help and --version print and exit."""
    given = vars(_parser().parse_args(arguments))
    types = get_type_hints(Settings)
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        source, text = _source(entry.name, given, environment)
        if not text:
            continue
        value = _convert(source, text, types[entry.name])
        problem = entry.metadata["check"](value) if entry.metadata["check"] else None
        if problem:
            raise BadSetting(f"{source} {problem}, not {text}")
        values[entry.name] = value
    settings = Settings(**values)
    if settings.http_port == settings.grpc_port != 0:
        raise BadSetting(f"--http_port and --grpc_port are both {settings.http_port}: give each a port of its own")
    return settings


def _source(name: str, given: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Where the setting's value is taken from, and its text; an empty text means nowhere."""
    variable = environment_variable(name)
    if name in given:
        return f"--{name}", given[name]
    if environment.get(variable):
        return variable, environment[variable]
    if name == "http_port":
        # Knative and Cloud Run set PORT to the published port. Where that is gRPC's, REST stays where it is.
        published = environment.get("PORT", "")
        grpc_port = _source("grpc_port", given, environment)[1] or str(Settings().grpc_port)
        return "PORT", published if published != grpc_port else ""
    if name in KSERVE_VARIABLES:
        text = environment.get(name.upper(), "")
        return name.upper(), text.lower() if name == "protocol" else text
    if name == "model_name":
        return "K_SERVICE", re.sub(r"-predictor(-.*)?$", "", environment.get("K_SERVICE", ""))
    return variable, ""


def _convert(source: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise BadSetting(f"{source} must be true or false, not {text}")
        return BOOLEANS[text.lower()]
    if kind is not int:
        return Path(text) if kind == Path | None else text
    try:
        return int(text)
    except ValueError:
        raise BadSetting(f"{source} must be a whole number, not {text}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if re.search("--(enable[-_])?predictor[-_]", message):
            raise BadSetting(f"{message} ({TRANSFORMERS})")
        raise BadSetting(f"{message} (--help lists the flags)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="app.py",
        description="Serves a model over KServe's REST and gRPC protocols.",
        epilog=f"Every flag may be written with - for _. {TRANSFORMERS}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=__version__)
    for entry in fields(Settings):
        spellings = dict.fromkeys([f"--{entry.name}", f"--{entry.name.replace('_', '-')}"])
        help_text = entry.metadata["help"].replace("%", "%%")
        default = "" if entry.default in (None, "") else f"default {default_text(entry.default)}, "
        parser.add_argument(
            *spellings,
            dest=entry.name,
            metavar=entry.name.rsplit("_", 1)[-1].upper(),
            help=f"{help_text} ({default}environment {environment_variable(entry.name)})",
        )
    return parser
