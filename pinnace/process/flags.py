"""The settings from flags and environment variables.

A flag overrides its environment variable, which overrides the platform's own (PORT, K_SERVICE, KServe's), which
overrides the default. Environment variables matter: in a buildpack image, arguments replace the Procfile's whole line.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from pinnace.errors import ConfigurationError
from pinnace.process.sockets import SOCKETS_ENV
from pinnace.runtimes.shared_weights import SHARED_WEIGHTS_ENV
from pinnace.settings import GROUPS, Settings
from pinnace.version import NAME, __version__

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "PINNACE_"
INTERNAL_VARIABLES = frozenset({SOCKETS_ENV, SHARED_WEIGHTS_ENV})  # which a supervisor sets for its workers
# Kubernetes sets these for a Service named pinnace, or pinnace-…; PINNACE_HTTP_PORT=tcp://… clashes with a setting.
SERVICE_VARIABLES = re.compile(r"PINNACE_(SERVICE_|PORT).*|.+_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_.*)?")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
KSERVE_VARIABLES = ("protocol", "storage_uri", "ce_type", "ce_source", "ce_merge")  # known under their bare names
CHECK = "--check"
BOOLEANS = dict.fromkeys(("y", "yes", "t", "true", "on", "1"), True) | dict.fromkeys(
    ("n", "no", "f", "false", "off", "0"), False
)  # as KServe's flags take them
TRANSFORMERS = (
    "KServe's --predictor_* flags and --enable_predictor_health_check are for transformers, and this is no transformer."
)


def environment_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def default_text(default: Any) -> str:
    """Return a default as a flag's value is written."""
    if isinstance(default, tuple):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else "" if default is None else str(default)


def warn_of_unknown_variables(environment: Mapping[str, str]) -> None:
    """Log a warning for each PINNACE_… variable that is no setting's; a supervisor's workers leave that to it."""
    if SOCKETS_ENV in environment:
        return
    settings = [environment_variable(entry.name) for entry in fields(Settings)]
    for name in sorted(environment.keys() - {*settings, *INTERNAL_VARIABLES}):
        if not name.startswith(ENVIRONMENT_PREFIX) or SERVICE_VARIABLES.fullmatch(name):
            continue
        if not SERVICE_ADDRESS.match(environment[name]):
            (nearest,) = get_close_matches(name, settings, 1, cutoff=0)
            logger.warning("the environment variable %s is unknown and ignored: the nearest is %s", name, nearest)


def parse_settings(
    arguments: Sequence[str], environment: Mapping[str, str], program: str = f"{NAME} serve"
) -> Settings:
    """Return the settings; `program` is how --help calls it. Raises ConfigurationError; --help and --version exit."""
    types = get_type_hints(Settings)
    flags, unknown = _parser(types, program).parse_known_args(arguments)
    if unknown:
        raise ConfigurationError(_unknown_argument(unknown[0]))
    given = vars(flags)
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        source, text = _source(entry.name, given, environment)
        if not text:
            continue
        value = _convert(source, text, types[entry.name])
        if check := entry.metadata["check"]:
            for item in value if isinstance(value, tuple) else [value]:
                if problem := check(item):
                    raise ConfigurationError(f"{source} {problem}, not {item}")
        values[entry.name] = value
    settings = Settings(**values)
    if settings.enable_grpc and settings.http_port == settings.grpc_port != 0:
        raise ConfigurationError(
            f"--http_port and --grpc_port are both {settings.http_port}: give each a port of its own"
        )
    if bool(settings.ssl_certfile) != bool(settings.ssl_keyfile):
        raise ConfigurationError("--ssl_certfile and --ssl_keyfile belong together: give both")
    if settings.ssl_ca_certs and not settings.ssl_certfile:
        raise ConfigurationError("--ssl_ca_certs needs --ssl_certfile: certificates are shown over TLS")
    if settings.drain_delay_seconds >= settings.grace_period_seconds:
        raise ConfigurationError("--drain_delay_seconds is part of --grace_period_seconds, and must be smaller")
    if settings.workers > 1 and settings.engine == "ray":
        raise ConfigurationError("--engine=ray needs --workers=1: its replicas are the workers, see --num_replicas")
    if settings.workers > 1 and settings.enable_model_repository:
        raise ConfigurationError(
            "--enable_model_repository needs --workers=1: a client reaches one of several workers only"
        )
    return settings


def _source(name: str, given: Mapping[str, str | list[str]], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return where the setting's value comes from, and its text, which is empty where it is not set."""
    variable = environment_variable(name)
    if name in given:
        value = given[name]
        return f"--{name}", value if isinstance(value, str) else ",".join(value)
    text = environment.get(variable, "")
    if text and not SERVICE_ADDRESS.match(text):
        return variable, text
    if name == "http_port":
        # Knative and Cloud Run set PORT to the published port. Where that is gRPC's, REST stays where it is.
        published = environment.get("PORT", "")
        grpc_port = _source("grpc_port", given, environment)[1] or str(Settings().grpc_port)
        has_grpc = BOOLEANS.get(_source("enable_grpc", given, environment)[1].lower(), True)
        return "PORT", "" if has_grpc and published == grpc_port else published
    if name in KSERVE_VARIABLES:
        text = environment.get(name.upper(), "")
        return name.upper(), text.lower() if name == "protocol" else text
    if name == "model_name":
        return "K_SERVICE", re.sub(r"-predictor(-.*)?$", "", environment.get("K_SERVICE", ""))
    return variable, ""


def _unknown_argument(argument: str) -> str:
    """Return what is wrong with an argument that is no flag's, naming the nearest flag."""
    flag = argument.partition("=")[0]
    if re.match("--(enable[-_])?predictor[-_]", flag):
        return f"unknown flag {flag}: {TRANSFORMERS}"
    if not flag.startswith("-"):
        return f"unexpected argument {argument}: a flag is written --flag=value (--help lists the flags)"
    names = [entry.name for entry in fields(Settings)] + [CHECK.strip("-"), "version", "help"]
    nearest = get_close_matches(flag.strip("-").replace("-", "_"), names, 1)
    suggestion = f", did you mean --{nearest[0]}?" if nearest else ""
    return f"unknown flag {flag}{suggestion} (--help lists the flags)"


def _convert(source: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ConfigurationError(f"{source} must be true or false, not {text}")
        return BOOLEANS[text.lower()]
    if kind == tuple[str, ...]:
        return tuple(filter(None, text.split(",")))
    if kind is not int:
        return Path(text) if kind == Path | None else text
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{source} must be a whole number, not {text}") from None


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6, width=min(100, shutil.get_terminal_size().columns))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (--help lists the flags)")


def _parser(types: Mapping[str, Any], program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage=f"{program} [--flag=value …]",
        formatter_class=_HelpFormatter,
        description="Serve a model over KServe's REST and gRPC protocols.",
        epilog=f"Every flag may be written with - for _. {TRANSFORMERS}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        CHECK, action="store_true", help="load the models, print what would be served and exit, without listening"
    )
    group = parser.add_argument_group()
    for entry in fields(Settings):
        if entry.name in GROUPS:
            group = parser.add_argument_group(GROUPS[entry.name])
        help_text = entry.metadata["help"].replace("%", "%%")
        default = f"default {default_text(entry.default)}, " if default_text(entry.default) else ""
        shown = f"{help_text} ({default}environment {environment_variable(entry.name)})"
        for flag, help_shown in {
            f"--{entry.name.replace('_', '-')}": argparse.SUPPRESS,
            f"--{entry.name}": shown,
        }.items():
            group.add_argument(
                flag,
                dest=entry.name,
                action="append" if types[entry.name] == tuple[str, ...] else "store",
                metavar="true|false" if types[entry.name] is bool else entry.name.rsplit("_", 1)[-1].upper(),
                help=help_shown,
            )
    return parser
