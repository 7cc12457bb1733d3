"""Measures the server beside what the same cores can do without one: `make bench`."""

import serving as serving  # first, since it turns ONNX Runtime's telemetry off
