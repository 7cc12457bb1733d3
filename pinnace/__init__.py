"""A model server for KServe's REST and gRPC protocols. app.py, beside this package, runs it."""

import os
import signal

NAME = "pinnace"
__version__ = "0.1.0"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

# ONNX Runtime sends usage data to its makers (from 1.29 on Linux too) unless told before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
