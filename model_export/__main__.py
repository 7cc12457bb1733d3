"""The command line: arguments in, progress out, one line and an exit code when it fails."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from model_export.errors import ExportError
from pinnace.observability.logging import banner


def main() -> int:
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _export(_arguments())
    except ExportError as error:
        sys.stderr.write(f"model_export: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("model_export: interrupted, nothing written\n")
        return 128 + signal.SIGINT


def _export(arguments: argparse.Namespace) -> int:
    step = _Progress()
    step("importing torch")
    # Here, so that --help and a wrong flag answer at once.
    from model_export import export, quantize, source, verify

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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model_export",
        description="Exports a torchvision classifier, and checks the result against the original on photographs.",
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
    return parser.parse_args()


class _Progress:
    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", flush=True)


def _terminate(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
