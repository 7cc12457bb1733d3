"""The command line: `pinnace serve`, `pinnace check` and `pinnace export`.

A failure that a user can cause ends in one line on standard error, which begins with `pinnace: `, and an exit code of
its own (pinnace/errors.py).
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import FrameType
from typing import NoReturn

from pinnace.errors import ConfigurationError, PackageMissing, RayHeadLost, ShutdownTimeout, StartupError
from pinnace.observability.logging import set_up_logging
from pinnace.process import STOP_SIGNALS
from pinnace.process.descriptors import check_fd_limit
from pinnace.process.exit import end_process, print_error
from pinnace.process.flags import CHECK, parse_settings, warn_of_unknown_variables
from pinnace.settings import Settings
from pinnace.version import NAME, __version__

HELP = f"""\
usage: {NAME} COMMAND [--flag=value …]

A model server for KServe's REST and gRPC protocols.

commands:
  serve    serve models
  check    load the models, print what would be served and exit, without listening
  export   export a torchvision classifier to a model directory; needs the extra 'export'

`{NAME} COMMAND --help` lists a command's flags; `{NAME} --version` prints the version.
"""


def main(arguments: Sequence[str] | None = None, program: str = f"{NAME} serve") -> int:
    """Run a command and return its exit code; a server or a check ends the process itself.

    `program` is what `serve --help` calls itself: app.py serves without the word `serve`.
    """
    command, *flags = (sys.argv[1:] if arguments is None else arguments) or [""]
    commands: dict[str, Callable[[], int]] = {
        "serve": lambda: _serve(flags, program),
        "check": lambda: _serve([CHECK, *flags], f"{NAME} check"),
        "export": lambda: _export(flags),
        "--help": lambda: _print(HELP),
        "-h": lambda: _print(HELP),
        "--version": lambda: _print(f"{__version__}\n"),
    }
    try:
        if command not in commands:
            raise ConfigurationError(_unknown_command(command, [*commands]))
        return commands[command]()
    except StartupError as error:
        print_error(error)
        return error.exit_code


def _unknown_command(command: str, commands: Sequence[str]) -> str:
    if not command:
        problem = "a command is missing"
    elif command.startswith("-"):
        problem = f"a command must come first, as in `{NAME} serve {command}`"
    else:
        nearest = get_close_matches(command, commands, 1)
        problem = f"unknown command {command}" + (f", did you mean {nearest[0]}?" if nearest else "")
    return f"{problem} (--help lists the commands)"


def _print(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _serve(flags: Sequence[str], program: str) -> NoReturn:
    """Serve until a stop signal; with --check, only load the models and print what would be served.

    Then end the process without waiting for threads: a predictor may have started one that never ends. Raises
    ConfigurationError for wrong flags; a later StartupError is printed here.
    """
    _open_standard_descriptors()
    settings = parse_settings(flags, os.environ, program)
    set_up_logging(settings, os.environ)
    warn_of_unknown_variables(os.environ)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_before_ready)  # nothing is accepted yet, so nothing is lost
    _import_from_working_directory()
    try:
        exit_code = _run(settings, CHECK in flags)
    except StartupError as error:
        print_error(error)
        exit_code = error.exit_code
        if isinstance(error, ShutdownTimeout | RayHeadLost):
            end_process(exit_code)  # at once: Ray's own end may never come back
    atexit._run_exitfuncs()
    end_process(exit_code)


def _open_standard_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed.

    The next socket would get its number, and what a library prints would go to a client.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _run(settings: Settings, check_only: bool) -> int:
    """Run what the settings say, and return its exit code. Raises StartupError."""
    check_fd_limit(settings)  # before grpc is imported: it crashes if there are too few
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: its C core would log beside us
    # Each branch imports only what it needs: a supervisor takes 20 MB, a server five times as much.
    if check_only:
        from pinnace.process import check

        sys.stdout.writelines(f"{line}\n" for line in check.run(settings))
        return 0
    if settings.workers > 1:
        from pinnace.process import supervisor

        return supervisor.run(settings)
    from pinnace.process import server

    server.run(settings)
    return 0


def _import_from_working_directory() -> None:
    """Make the modules in the working directory importable, since a predictor may be one of them.

    `python -m` does so itself. The installed script and `python /path/to/app.py` have their own directory on the import
    path instead, so the working directory is put before it.
    """
    with suppress(FileNotFoundError):  # it has been removed
        directory = os.getcwd()
        if not {"", directory} & set(sys.path):
            sys.path.insert(0, directory)


def _export(flags: Sequence[str]) -> int:
    """Export a model. Raises PackageMissing."""
    try:
        # By name, since the server never imports the export: an image does not have it.
        export = importlib.import_module("model_export.__main__")
    except ModuleNotFoundError as error:
        raise PackageMissing(
            f"export needs the package model_export ({error}): run `pip install 'pinnace[cpu,export]'`"
        ) from error
    exit_code: int = export.main(flags, f"{NAME} export")
    return exit_code


def _stop_before_ready(signal_number: int, _: FrameType | None) -> None:
    logging.getLogger(NAME).info("%s before ready: stopped", signal.Signals(signal_number).name)
    end_process(0)  # SystemExit in the midst of an import may come out of it as an ImportError
