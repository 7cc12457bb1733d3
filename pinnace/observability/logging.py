"""Logging in KServe's format or as JSON, unless a configuration file changes it.

Configurations written for KServe work unchanged. They name KServe's loggers, and loggers and classes of uvicorn, which
is not installed. Therefore the loggers of this server and of Hypercorn have `kserve` and `uvicorn.error` as parents,
access lines go to `uvicorn.access`, and uvicorn's formatter classes are replaced by those of this module.

A record is one line, and no part of it is a command for a terminal: what is not printable in a message or in the text
of an exception is escaped in the record itself, so that it holds for any formatter.
"""

from __future__ import annotations

import configparser
import json
import logging
import logging.config
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from pinnace.errors import ConfigurationError, InternalError, ServingError, escape_unprintable, one_line
from pinnace.observability.log_writer import QueuedStreamHandler
from pinnace.observability.timings import LATENCY_LOGGER, current_request_id
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

ACCESS_LOGGER = "uvicorn.access"
FORMATTED_ACCESS_LOGGER = "access"  # KServe's logger for --access_log_format
LOGGER_PARENTS = {"pinnace": "kserve", "hypercorn.error": "uvicorn.error"}

DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
RESET = "\033[0m"
COLOURS = {"DEBUG": "\033[36m", "INFO": "\033[32m", "WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[91m"}


class EscapedArguments(dict[str, Any]):
    """Arguments of a log message whose texts are escaped already, so that the message keeps tabs of its own."""


class EscapedRecord(logging.LogRecord):
    """A log record whose message and exception are printable: the message is one line, the traceback several."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[1]:
            self.exc_text = format_exception(self.exc_info[1])  # which formatters use instead of their own

    def getMessage(self) -> str:
        """Return the message with its arguments, escaped."""
        message = super().getMessage()
        return message if isinstance(self.args, EscapedArguments) else escape_unprintable(message)


def format_exception(error: BaseException) -> str:
    """Return the traceback of an exception and of those that caused it, with the texts of all of them escaped."""
    formatted = traceback.TracebackException(type(error), error, error.__traceback__)
    found: list[traceback.TracebackException | None] = [formatted]
    for exception in found:
        if exception:
            # The text is in a private attribute. Escaped afterwards, its line breaks could not be told from ours.
            vars(exception)["_str"] = escape_unprintable(str(exception))
            if exception.__notes__:
                exception.__notes__ = [escape_unprintable(str(note)) for note in exception.__notes__]
            found += [exception.__cause__, exception.__context__, *(exception.exceptions or ())]
    return "\n".join(map(escape_unprintable, "".join(formatted.format()).rstrip("\n").split("\n")))


class DefaultFormatter(logging.Formatter):
    """Formatter with uvicorn's `%(levelprefix)s`: the level and a colon, padded to one width, optionally in colour."""

    def __init__(self, fmt: str | None = None, datefmt: str | None = None, style: Any = "%", use_colors: bool = False):
        super().__init__(fmt, datefmt, style)
        self._use_colors = bool(use_colors)

    def formatMessage(self, record: logging.LogRecord) -> str:
        name = record.levelname
        shown = f"{COLOURS.get(name, '')}{name}{RESET}" if self._use_colors else name
        record.__dict__["shownlevel"] = shown
        record.__dict__["levelprefix"] = f"{shown}:{' ' * (8 - len(name))}"
        return super().formatMessage(record)


class AccessFormatter(DefaultFormatter):
    """Formatter with uvicorn's fields of an access line: `client_addr`, `request_line` and `status_code`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, version, status = record.args
            record.__dict__ |= {
                "client_addr": client,
                "request_line": f"{method} {path} HTTP/{version}",
                "status_code": status_phrase(status),
            }
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """Formatter that writes one line of JSON per record, including the record's `extra` fields."""

    STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id():
            entry["request_id"] = request_id
        entry |= {name: value for name, value in vars(record).items() if name not in self.STANDARD}
        if record.exc_info:
            entry["exception"] = record.exc_text or self.formatException(record.exc_info)
        line = json.dumps(entry, default=str, ensure_ascii=False)
        return line if line.isprintable() else "".join(map(_escape_in_json, line))


def _escape_in_json(character: str) -> str:
    if character.isprintable():
        return character
    if character == "\x7f":  # the only control character that JSON may contain
        return r"\u007f"
    if "\ud800" <= character <= "\udfff":  # as text, since many readers of JSON refuse a lone surrogate
        return rf"\\u{ord(character):04x}"
    return json.dumps(character).strip('"')


def banner(text: str) -> list[str]:
    """Return three lines that stand out in a log: a rule, the text, and a rule."""
    rule = "=" * 100
    return [rule, text, rule]


def to_client_error(error: BaseException) -> ServingError:
    """Return `error` if it is a ServingError; otherwise log its traceback and return InternalError."""
    if isinstance(error, ServingError):
        return error
    logger.error("request %s failed", current_request_id() or "N.A.", exc_info=error)
    return InternalError()


def status_phrase(status: Any) -> str:
    """Return the status with its phrase, such as `200 OK`, or alone if it has none."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def set_up_logging(settings: Settings, environment: Mapping[str, str]) -> None:
    """Set up logging for the process. Raises ConfigurationError.

    Without settings.configure_logging only KSERVE_LOGLEVEL is checked.
    """
    level = environment.get("KSERVE_LOGLEVEL", "INFO").upper()
    if level not in COLOURS:
        raise ConfigurationError(f"KSERVE_LOGLEVEL must be one of {', '.join(COLOURS)}, not {level}")
    if not settings.configure_logging:
        return
    for name, parent in LOGGER_PARENTS.items():
        logging.getLogger(name).parent = logging.getLogger(parent)
    file = settings.log_config_file
    try:
        if file is None:
            colours = bool(sys.stderr and sys.stderr.isatty()) and not environment.get("NO_COLOR")
            configure_logging(_default_configuration(level, settings.log_format, colours))
        elif file.suffix == ".json":
            configure_logging(json.loads(file.read_text()))
        elif file.suffix in (".yaml", ".yml"):
            import yaml  # only YAML files need it

            configure_logging(yaml.safe_load(file.read_text()))
        else:
            logging.setLogRecordFactory(EscapedRecord)
            ini = configparser.RawConfigParser()
            ini.read_string(_translate(file.read_text()))
            logging.config.fileConfig(ini, disable_existing_loggers=False)
    except Exception as error:  # dictConfig raises nearly any exception
        raise ConfigurationError(f"--log_config_file={file} cannot be used: {one_line(error)}") from error


def configure_logging(configuration: dict[str, Any]) -> None:
    """Configure logging from a predictor's own dictionary, as `logging.config.dictConfig` does.

    Configurations written for KServe work unchanged: uvicorn's formatter classes are replaced by the ones here.
    """
    logging.setLogRecordFactory(EscapedRecord)
    logging.config.dictConfig(_translate(configuration))


def _translate(configuration: Any) -> Any:
    """Return the configuration with uvicorn's classes replaced, and with loggers that it does not name left enabled."""
    if isinstance(configuration, str):
        return configuration.replace("uvicorn.logging.", f"{__name__}.")
    if isinstance(configuration, list):
        return [_translate(item) for item in configuration]
    if not isinstance(configuration, dict):
        return configuration
    translated = {name: _translate(item) for name, item in configuration.items()}
    if "version" in translated:
        translated.setdefault("disable_existing_loggers", False)
    return translated


def _default_configuration(level: str, log_format: str, colours: bool) -> dict[str, Any]:
    location = "[%(filename)s:%(funcName)s():%(lineno)d]"
    formatters: dict[str, Any] = {
        "default": {
            "()": f"{__name__}.DefaultFormatter",
            "fmt": f"%(asctime)s.%(msecs)03d %(process)d %(name)s %(shownlevel)s {location} %(message)s",
            "datefmt": DATE_FORMAT,
            "use_colors": colours,
        },
        "access": {
            "()": f"{__name__}.AccessFormatter",
            "fmt": "%(asctime)s.%(msecs)03d %(name)s %(levelprefix)s %(client_addr)s %(process)d - "
            '"%(request_line)s" %(status_code)s',
            "datefmt": DATE_FORMAT,
        },
        "trace": {"format": "%(asctime)s.%(msecs)03d %(process)d %(name)s %(message)s", "datefmt": DATE_FORMAT},
        "bare": {"format": "%(message)s"},
    }
    if log_format == "json":
        formatters = {name: {"()": f"{__name__}.JsonFormatter"} for name in formatters}
    streams = dict.fromkeys(("default", "trace"), "ext://sys.stderr") | dict.fromkeys(
        ("access", "bare"), "ext://sys.stdout"
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": formatters,
        "handlers": {
            name: {
                "class": f"{QueuedStreamHandler.__module__}.QueuedStreamHandler",
                "formatter": name,
                "stream": stream,
            }
            for name, stream in streams.items()
        },
        "root": {"handlers": ["default"], "level": level},
        "loggers": {
            **{
                name: {"handlers": [handler], "level": "INFO", "propagate": False}
                for name, handler in {
                    ACCESS_LOGGER: "access",
                    LATENCY_LOGGER: "trace",
                    FORMATTED_ACCESS_LOGGER: "bare",
                }.items()
            },
            "hypercorn.error": {"level": "WARNING"},  # its startup messages repeat this server's
        },
    }
