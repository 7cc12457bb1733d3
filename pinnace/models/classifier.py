"""The default predictor, for image classifiers that model_export exported. --predictor names a class for others."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinnace.errors import InvalidInput, ModelLoadError, TooLarge, one_line
from pinnace.memory import is_out_of_memory
from pinnace.models import image
from pinnace.models.model_card import ModelCard
from pinnace.predictor import Arrays, Predictor, PreprocessCost, Request, RequestedOutput, Response
from pinnace.runtimes.onnx import NO_MEMORY, OnnxSession
from pinnace.tensors import Tensor, TensorSpec

DEFAULT_OUTPUT = "output-0"
TOP = 5
FLOAT_BYTES = 4
TRAFFIC_LIGHT = (  # a PNG of 24 × 18 pixels, the example request
    "iVBORw0KGgoAAAANSUhEUgAAABgAAAASBAMAAACzwgOtAAAAGFBMVEWuloWGgYhtfZtWdKR4XVJcUkxIW3QtKyrKZn0kAAAAgUlE"
    "QVR42l3OMQoCQQxA0Z8Ya2fQzmaOoLgXELyed7K1E+ysFmth5gDuxEJ3XE2VwCN82fEdnewYwGzP4wJYBmy4rvM/ex8SCo1puuXx"
    "AfU+YZpobA6eWW0M4sdug0EXACJgB8ChdAtBlzHwPJ5PSEJra+jRVJ0y5vTIT5sDkL28AAHuH2+T7HipAAAAAElFTkSuQmCC"
)
TENSOR_DATATYPES = ("FP16", "FP32", "FP64", "INT64")  # V1 turns JSON numbers into INT64 if all are whole


class Classifier(Predictor):
    """Predictor that classifies images, or tensors that a transformer has preprocessed. Returns the top 5 classes."""

    inputs = (TensorSpec("input-0", "BYTES", (-1,)),)
    platform = "onnxruntime_onnx"
    example = ({"image": {"b64": TRAFFIC_LIGHT}},)

    def load(self) -> None:
        """Load the model and run it once. Raises what OnnxSession raises, and ModelLoadError for a foreign model."""
        self.session = OnnxSession(
            self.model_dir, self.settings.device, self.settings.threads, self.settings.gpu_memory_percent
        )
        self.uses_all_cores = self.session.device == "cpu"
        try:
            self.card = card = ModelCard.from_properties(self.session.metadata)
        except (KeyError, ValueError) as error:
            raise ModelLoadError(
                f"{self.model_dir} lacks the metadata that `python -m model_export` writes ({error}); export it again, "
                "or name the class of another kind of model with --predictor"
            ) from error
        self.warning = card.warning
        self.properties = {
            "architecture": card.architecture,
            "weights": card.weights,
            "precision": card.precision,
            "device": self.session.device,
        }
        self.preprocessing = image.Preprocessing(
            card.resize_pixels, card.crop_pixels, card.interpolation, card.mean, card.std, self.settings.fast_decode
        )
        self.row_shape = (3, card.crop_pixels, card.crop_pixels)
        self.labels = np.array([label.encode() for label in card.labels], object)
        top = min(TOP, len(self.labels))
        self.outputs = (
            TensorSpec(DEFAULT_OUTPUT, "FP32", (-1, top)),
            TensorSpec("indices", "INT64", (-1, top)),
            TensorSpec("probabilities", "FP32", (-1, top)),
            TensorSpec("labels", "BYTES", (-1, top)),
            TensorSpec("logits", "FP32", (-1, len(self.labels))),
        )
        self._warm_up()

    def estimate_preprocess(self, request: Request) -> PreprocessCost:
        """Return the cost of decoding the images, from their headers: one at a time, beside the pixels of all rows.

        Raises InvalidInput, and TooLarge for an image or a request with too many pixels.
        """
        if request.num_instances and len(request.inputs) > 1:
            raise InvalidInput(f"each instance must have one value, not {len(request.inputs)}")
        num_rows, peak_bytes, work_pixels, seconds = 0, 0, 0, 0.0
        for tensor in request.inputs:
            num_rows += _count_rows(tensor)
            if tensor.datatype != "BYTES":
                continue
            for row, element in enumerate(tensor.array.flat):
                with _name_row(tensor.name, row):
                    header = image.read_size(image.image_bytes(element), self.settings.max_image_pixels)
                resize_bytes = self.preprocessing.resize_bytes(header.width, header.height)
                peak_bytes = max(peak_bytes, len(element) + header.decode_bytes + resize_bytes)
                seconds += header.decode_seconds
                work_pixels += header.work_pixels
        if work_pixels > self.settings.max_request_pixels:
            raise TooLarge(
                f"the images of the request have {work_pixels} pixels, more than max_request_pixels "
                f"({self.settings.max_request_pixels}); a JPEG of more than 10 scans counts once for every 10"
            )
        return PreprocessCost(peak_bytes + num_rows * math.prod(self.row_shape) * FLOAT_BYTES, seconds)

    def preprocess(self, request: Request) -> Arrays:
        """Convert images or preprocessed tensors to one array, `pixels`: FP32 of shape [rows, 3, crop, crop].

        The rows of several inputs are concatenated. Raises InvalidInput and TooLarge.
        """
        only = request.inputs[0]
        if len(request.inputs) == 1 and only.datatype != "BYTES":
            return {"pixels": self._tensor_input(only)}
        pixels = np.empty((sum(map(_count_rows, request.inputs)), *self.row_shape), np.float32)
        end = 0
        for tensor in request.inputs:
            start, end = end, end + _count_rows(tensor)
            if tensor.datatype == "BYTES":
                self._decode_images(tensor, pixels[start:end], request)
            else:
                pixels[start:end] = self._tensor_input(tensor)
        return {"pixels": pixels}

    def predict(self, rows: Arrays) -> Arrays:
        """Return `logits`, FP32 of shape [rows, classes], for `pixels`."""
        return self.session.run(rows)

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        """Return the requested outputs, or `output-0`, and the request's time so far, as the tutorial's model does.

        Raises InvalidInput if an output's `classification` parameter is invalid, or if the logits of a row are not
        finite: its numbers, though finite, are too large for the arithmetic of the model.
        """
        logits = predictions["logits"]
        is_finite = np.isfinite(logits)
        if not is_finite.all():
            row = int(np.argmin(is_finite.all(axis=1)))
            raise InvalidInput(f"row {row}: the model's result is not finite, since the input's values are too large")
        order = np.argsort(-logits, axis=1, kind="stable")
        requested = request.outputs or (RequestedOutput(DEFAULT_OUTPUT),)
        outputs = [self._output(output, logits, order) for output in requested]
        milliseconds = (time.perf_counter() - request.started_at) * 1000
        return Response(outputs, {"prediction-time-latency": str(round(milliseconds, 9))})

    def _output(self, output: RequestedOutput, logits: NDArray[np.float32], order: NDArray[np.int64]) -> Tensor:
        """Return one output. `order` holds the class indices of each row, the highest logit first."""
        values = _softmax(logits) if output.name == "probabilities" else logits
        classes = output.parameters.get("classification")
        if classes is not None:
            return self._classification(output.name, classes, values, order)
        if output.name == "logits":
            return Tensor(output.name, logits)
        highest = order[:, :TOP]
        if output.name == "indices":
            return Tensor(output.name, highest)
        if output.name == "labels":
            return Tensor(output.name, self.labels[highest])
        return Tensor(output.name, np.take_along_axis(values, highest, axis=1))

    def _classification(self, name: str, classes: Any, values: NDArray[np.float32], order: NDArray[np.int64]) -> Tensor:
        """Return the highest classes of each row as `value:index:label`.

        This is Triton's classification extension:
        https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
        """
        if name in ("indices", "labels"):
            raise InvalidInput(
                f"output '{name}' does not support classification: use {DEFAULT_OUTPUT} or probabilities"
            )
        if not isinstance(classes, int) or isinstance(classes, bool) or not 1 <= classes <= len(self.labels):
            raise InvalidInput(f"output '{name}': classification must be a number from 1 to {len(self.labels)}")
        highest = order[:, :classes]
        texts = np.empty(highest.shape, object)
        for (row, column), index in np.ndenumerate(highest):
            texts[row, column] = b"%f:%d:%s" % (values[row, index], index, self.labels[index])
        return Tensor(name, texts)

    def _decode_images(self, tensor: Tensor, pixels: NDArray[np.float32], request: Request) -> None:
        """Decode the images of an input to the rows of `pixels`, unless the request is abandoned meanwhile."""
        shorter_pixels = self.card.resize_pixels if self.settings.fast_decode else 0
        for row, element in enumerate(tensor.array.flat):
            request.check_abandoned()
            with _name_row(tensor.name, row):
                picture = image.decode(image.image_bytes(element), self.settings.max_image_pixels, shorter_pixels)
            self.preprocessing(picture, pixels[row])

    def _warm_up(self) -> None:
        """Run the model once, to allocate memory, start threads and prove that it works. Raises ModelLoadError."""
        try:
            logits = self.predict({"pixels": np.zeros((1, *self.row_shape), np.float32)})["logits"]
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            if is_out_of_memory(error):
                raise ModelLoadError(NO_MEMORY.format(self.model_dir, one_line(error))) from error
            raise ModelLoadError(
                f"{self.model_dir} does not run ({one_line(error)}); export the model again"
            ) from error
        if logits.shape != (1, len(self.card.labels)):
            raise ModelLoadError(f"{self.model_dir} has {logits.shape[-1]} logits for {len(self.card.labels)} labels")

    def _tensor_input(self, tensor: Tensor) -> NDArray[np.float32]:
        if tensor.datatype not in TENSOR_DATATYPES or tensor.shape[1:] != self.row_shape:
            raise InvalidInput(
                f"input '{tensor.name}' is {tensor.datatype} of shape {list(tensor.shape)}: "
                f"expected BYTES with one image per row, or FP32 of shape [rows, {', '.join(map(str, self.row_shape))}]"
            )
        with np.errstate(over="ignore"):
            pixels = np.require(tensor.array, np.float32, ["C", "ALIGNED"])  # arrays over received bytes may be neither
        if not np.isfinite(pixels).all():
            raise InvalidInput(f"input '{tensor.name}' has values that are not finite FP32 numbers")
        return pixels


def _count_rows(tensor: Tensor) -> int:
    """Return the number of rows of an input. Every element of a BYTES tensor, of whatever shape, is an image."""
    return tensor.array.size if tensor.datatype == "BYTES" else tensor.num_rows


@contextmanager
def _name_row(name: str, row: int) -> Iterator[None]:
    """Add the input's name and the row's number to the text of an error."""
    try:
        yield
    except (InvalidInput, TooLarge) as error:
        raise type(error)(f"input '{name}', row {row}: {error}") from None


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return shares
