"""The tests. Some import ONNX Runtime themselves, which sends usage data unless this is set before."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
