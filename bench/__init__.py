"""Measures the server beside what the same cores can do without one: `make bench`."""

import pinnace as pinnace  # first, since it turns ONNX Runtime's telemetry off
