"""Serves a model over KServe's REST and gRPC protocols: `python app.py --help`."""

import logging
import os
import sys

from serving import lifecycle
from serving.errors import DrainCut, StartError
from serving.logs import configure_logging
from serving.settings import parse_settings


def main() -> int:
    try:
        settings = parse_settings(sys.argv[1:], os.environ)
        configure_logging(settings, os.environ)
        lifecycle.run(settings)
    except StartError as error:
        sys.stderr.write(f"app.py: {error}\n")
        if isinstance(error, DrainCut):  # a thread may never come back: do not wait for it
            logging.shutdown()
            os._exit(error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
