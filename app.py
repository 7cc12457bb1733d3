"""Serves a model over KServe's REST and gRPC protocols: `python app.py --help`."""

import logging
import os
import signal
import sys
from types import FrameType

from serving import NAME, STOP_SIGNALS
from serving.command_line import CHECK, parse_settings
from serving.errors import DrainCut, EngineLost, StartError
from serving.logs import configure_logging


def main() -> int:
    try:
        settings = parse_settings(sys.argv[1:], os.environ)
        configure_logging(settings, os.environ)
        for number in STOP_SIGNALS:
            signal.signal(number, _leave)  # nothing is accepted yet, so nothing is lost
        if CHECK in sys.argv[1:]:
            from serving import check

            sys.stdout.writelines(f"{line}\n" for line in check.run(settings))
            return 0
        # Each imports only what it needs: a supervisor is 20 MB, a server five times that.
        if settings.workers > 1:
            from serving import supervisor

            return supervisor.run(settings)
        from serving import lifecycle

        lifecycle.run(settings)
    except StartError as error:
        sys.stderr.write(f"app.py: {error}\n")
        if isinstance(error, DrainCut | EngineLost):  # a thread, or Ray, may never come back: do not wait for it
            logging.shutdown()
            os._exit(error.exit_code)
        return error.exit_code
    return 0


def _leave(signal_number: int, _: FrameType | None) -> None:
    logging.getLogger(NAME).info("%s before ready: stopped", signal.Signals(signal_number).name)
    logging.shutdown()
    os._exit(0)  # SystemExit in the midst of an import may come out of it as an ImportError


if __name__ == "__main__":
    sys.exit(main())
