"""The command line of the export: it prints its progress, and one line and an exit code where it fails."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from model_export.errors import BadRequest, ExportError, PackageMissing
from pinnace.errors import StartupError, one_line
from pinnace.observability.logging import banner
from pinnace.runtimes.onnx import load_onnxruntime


def main(arguments: Sequence[str] | None = None, program: str = "python -m model_export") -> int:
    """Export a model and return the exit code. `program` is how --help and error lines call it."""
    signal.signal(signal.SIGTERM, _terminate)
    name = program.split()[0] if program.startswith("pinnace") else "model_export"
    try:
        return _export(_parse(arguments, program))
    except (ExportError, StartupError) as error:
        sys.stderr.write(f"{name}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted, nothing written\n")
        return 128 + signal.SIGINT


def _export(arguments: argparse.Namespace) -> int:
    step = _Progress()
    step("importing torch")
    # Imported here, so that --help and a wrong flag answer at once.
    load_onnxruntime()
    try:
        from model_export import export, quantize, source, verify
    except ImportError as error:
        raise PackageMissing(
            f"the export needs torch and its like ({one_line(error)}): run `pip install 'pinnace[cpu,export]'`, in a "
            "clone `pip install -r requirements-export.txt`"
        ) from error

    exactly = arguments.precision == "fp32"
    pictures, origin = ([], "") if exactly else quantize.images(arguments.calibration)  # a wrong folder fails at once

    step(f"loading {arguments.arch} with weights {arguments.weights}")
    original = source.load_source(arguments.arch, arguments.weights)
    card = export.make_card(original)
    step(f"converting to ONNX, opset {card.opset}")
    model = export.convert(original, card)

    def check(directory: Path) -> None:
        step("comparing with the original")
        step(f"  {verify.verify(original, directory)}")

    if exactly:
        file = export.write(model, card, arguments.output, check)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            exact = Path(scratch)
            export.write(model, card, exact, check)
            step(f"making it {arguments.precision}, on {origin}")
            model, card = quantize.quantize(model, card, exact, arguments.precision, pictures, origin)
            step(f"  {quantize.in_words(card.precision_error)}")
            file = export.write(model, card, arguments.output, lambda _: None)
    size = sum(path.stat().st_size for path in arguments.output.glob(f"*{export.WEIGHTS_SUFFIX}")) / 1e6
    step(f"{file} is ready: {card.architecture}, weights {card.weights}, {card.precision}, {size:.0f} MB")
    if card.warning:
        print(*banner(card.warning), sep="\n")
    return 0


def _parse(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    parser = _Parser(
        prog=program,
        description="Export a torchvision classifier, and check the result against the original on photographs.",
    )
    parser.add_argument("--arch", default="alexnet", help="a classifier of torchvision.models (default alexnet)")
    parser.add_argument(
        "--weights",
        default="pretrained",
        help="pretrained: torchvision's for ImageNet, or fail (default); auto: those, or seeded:0 behind a warning; "
        "seeded:N: untrained, from seed N; or the path of a state dict",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=["fp32", "fp16", "int8"],
        help="fp16 stores weights in half the room, int8 also computes in 8 bits; how far the answers then are from "
        "fp32's is printed, and written into the model",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        help="pictures to set int8's ranges by, in a directory; else scikit-image's photographs",
    )
    parser.add_argument("--output", default="model", type=Path, help="directory to write to (default model)")
    return parser.parse_args(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadRequest(f"{message} (--help lists the flags)")


class _Progress:
    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", flush=True)


def _terminate(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
