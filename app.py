"""Serves a model over KServe's REST and gRPC protocols: `python app.py --help`."""

import atexit
import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from pinnace import NAME, STOP_SIGNALS
from pinnace.errors import RayHeadLost, ShutdownTimeout, StartupError
from pinnace.observability.logging import configure_logging
from pinnace.process.flags import CHECK, parse_settings


def main() -> int:
    try:
        settings = parse_settings(sys.argv[1:], os.environ)
        configure_logging(settings, os.environ)
        for number in STOP_SIGNALS:
            signal.signal(number, _leave)  # nothing is accepted yet, so nothing is lost
        if CHECK in sys.argv[1:]:
            from pinnace.process import check

            sys.stdout.writelines(f"{line}\n" for line in check.run(settings))
            return 0
        # Each imports only what it needs: a supervisor is 20 MB, a server five times that.
        if settings.workers > 1:
            from pinnace.process import supervisor

            return supervisor.run(settings)
        from pinnace.process import server as lifecycle

        lifecycle.run(settings)
        atexit._run_exitfuncs()
        _end(0)
    except StartupError as error:
        sys.stderr.write(f"app.py: {error}\n")
        if isinstance(error, ShutdownTimeout | RayHeadLost):
            _end(error.exit_code)
        return error.exit_code


def _leave(signal_number: int, _: FrameType | None) -> None:
    logging.getLogger(NAME).info("%s before ready: stopped", signal.Signals(signal_number).name)
    _end(0)  # SystemExit in the midst of an import may come out of it as an ImportError


def _end(exit_code: int) -> NoReturn:
    """At once: a thread, or Ray, may never come back."""
    logging.shutdown()
    if sys.stdout:
        with suppress(OSError, RuntimeError):  # nobody reads it, or a signal has interrupted just that
            sys.stdout.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    sys.exit(main())
