"""A model server for KServe's REST and gRPC protocols. The names in `__all__` are its public API.

Everything else in this package is private and may change in any release. A predictor needs nothing but these names:

    from pinnace import Arrays, Predictor, Request, Response, Tensor, TensorSpec

They are loaded when they are first used, so `import pinnace` loads neither NumPy nor a server.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pinnace.version import __version__

if TYPE_CHECKING:
    from pinnace.errors import InvalidInput, NotSupported, Overloaded, ServingError, StartupError, TooLarge
    from pinnace.observability.logging import configure_logging
    from pinnace.predictor import Arrays, Predictor, PreprocessCost, Request, RequestedOutput, Response
    from pinnace.runtimes.onnx import OnnxSession
    from pinnace.settings import Settings
    from pinnace.tensors import Tensor, TensorSpec

__all__ = [
    "Arrays",
    "InvalidInput",
    "NotSupported",
    "OnnxSession",
    "Overloaded",
    "Predictor",
    "PreprocessCost",
    "Request",
    "RequestedOutput",
    "Response",
    "ServingError",
    "Settings",
    "StartupError",
    "Tensor",
    "TensorSpec",
    "TooLarge",
    "__version__",
    "configure_logging",
]

_MODULES = {
    "pinnace.errors": ("InvalidInput", "NotSupported", "Overloaded", "ServingError", "StartupError", "TooLarge"),
    "pinnace.observability.logging": ("configure_logging",),
    "pinnace.predictor": ("Arrays", "Predictor", "PreprocessCost", "Request", "RequestedOutput", "Response"),
    "pinnace.runtimes.onnx": ("OnnxSession",),
    "pinnace.settings": ("Settings",),
    "pinnace.tensors": ("Tensor", "TensorSpec"),
}

if not TYPE_CHECKING:  # a type checker would take any name for one of this function's

    def __getattr__(name: str) -> object:
        """Load a public name from its module (PEP 562). Raises AttributeError."""
        for module, names in _MODULES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(module), name)
                return value
        raise AttributeError(f"module 'pinnace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
