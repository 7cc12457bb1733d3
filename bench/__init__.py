"""Benchmarks of the server: `make bench`, `make overload` and `make soak`."""

import pinnace as pinnace  # first: importing it turns ONNX Runtime's telemetry off
