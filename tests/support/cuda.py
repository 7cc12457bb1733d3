"""Whether the tests of a GPU can run here."""

from __future__ import annotations

import onnxruntime

from pinnace.runtimes.onnx import CUDA

HAS_CUDA = CUDA in onnxruntime.get_available_providers()
