"""The command line of the export: it prints progress, and ends a failure with one line and an exit code."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from model_export.errors import DependencyMissing, ExportError, UsageError
from pinnace.errors import StartupError, one_line
from pinnace.observability.logging import banner
from pinnace.runtimes.onnx import load_onnxruntime


def main(arguments: Sequence[str] | None = None, program: str = "python -m model_export") -> int:
    """Run the export, and return its exit code. `program` is the name in --help and before error messages."""
    signal.signal(signal.SIGTERM, _terminate)
    name = program.split()[0] if program.startswith("pinnace") else "model_export"
    try:
        return _export(_parse_arguments(arguments, program))
    except (ExportError, StartupError) as error:
        sys.stderr.write(f"{name}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted, no model was written\n")
        return 128 + signal.SIGINT


def _export(arguments: argparse.Namespace) -> int:
    log_step = _Progress()
    log_step("importing torch")
    # Imported here: torch takes seconds to import, and --help and a wrong flag should answer at once.
    load_onnxruntime()
    try:
        from model_export import export, quantize, source, verify
    except ImportError as error:
        raise DependencyMissing(
            f"the export needs torch and the packages around it ({one_line(error)}): run `pip install "
            "'pinnace[cpu,export]'`, in a clone `pip install -r requirements-export.txt`"
        ) from error

    is_fp32 = arguments.precision == "fp32"
    # Read first, so that a wrong directory fails before the export has taken minutes.
    images, origin = ([], "") if is_fp32 else quantize.read_calibration_images(arguments.calibration)

    log_step(f"loading {arguments.arch} with weights {arguments.weights}")
    original = source.load_source(arguments.arch, arguments.weights)
    card = export.make_card(original)
    log_step(f"converting to ONNX, opset {card.opset}")
    model = export.convert(original, card)

    def check(directory: Path) -> None:
        log_step("comparing with the original")
        log_step(f"  {verify.verify(original, directory)}")

    if is_fp32:
        file = export.write_model(model, card, arguments.output, check)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            fp32_dir = Path(scratch)
            export.write_model(model, card, fp32_dir, check)
            log_step(f"converting to {arguments.precision}, with {origin}")
            model, card = quantize.quantize(model, card, fp32_dir, arguments.precision, images, origin)
            log_step(f"  {quantize.describe_error(card.precision_error)}")
            file = export.write_model(model, card, arguments.output, lambda _: None)
    size_mb = sum(path.stat().st_size for path in arguments.output.glob(f"*{export.WEIGHTS_SUFFIX}")) / 1e6
    log_step(f"{file} is ready: {card.architecture}, weights {card.weights}, {card.precision}, {size_mb:.0f} MB")
    if card.warning:
        print(*banner(card.warning), sep="\n")
    return 0


def _parse_arguments(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    parser = _Parser(
        prog=program,
        description="Export a torchvision classifier to ONNX, and verify on photographs that the exported model gives "
        "the original's answers.",
    )
    parser.add_argument(
        "--arch", default="alexnet", help="name of a classifier in torchvision.models (default alexnet)"
    )
    parser.add_argument(
        "--weights",
        default="pretrained",
        help="weights to export. pretrained: torchvision's ImageNet weights, an error if they cannot be downloaded "
        "(default); auto: the same, but untrained weights and a warning if they cannot be downloaded; seeded:N: "
        "untrained weights from random seed N; or the path of a state dict that torch.save wrote",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=["fp32", "fp16", "int8"],
        help="precision of the exported model (default fp32). fp16 stores the weights in half the size and computes "
        "in fp32; int8 stores and computes in 8 bits. The error against fp32 is measured, printed and written into "
        "the model",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        type=Path,
        help="directory of images for --precision=int8 to take its value ranges from, and to measure the error of "
        "fp16 or int8 on (default: scikit-image's photographs)",
    )
    parser.add_argument("--output", default="model", type=Path, help="directory to write the model to (default model)")
    return parser.parse_args(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise UsageError, so that a wrong flag ends in one line."""
        raise UsageError(f"{message} (--help lists the flags)")


class _Progress:
    """Printer of progress lines, each with the seconds since the start."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._started_at:6.1f} s  {text}", flush=True)


def _terminate(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
