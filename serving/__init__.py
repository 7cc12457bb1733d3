"""A model server for KServe's REST and gRPC protocols. app.py, beside this package, runs it."""

import signal

NAME = "serving"
__version__ = "0.1.0"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
