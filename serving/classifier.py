"""The predictor of image classifiers exported by model_export. For another kind of model, replace this file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving import image
from serving.engine import Engine
from serving.errors import InvalidInput, ModelDamaged, TooLarge, one_line
from serving.model_card import ModelCard
from serving.predictor import Predictor, Request, Response, Rows
from serving.tensors import Tensor, TensorSpec

TOP = 5
PREPARED_DATATYPES = ("FP16", "FP32", "FP64", "INT64")  # JSON has one kind of number: whole ones arrive as INT64


class Classifier(Predictor):
    """Images, or tensors that a transformer prepared, to the five highest logits of each."""

    inputs = (TensorSpec("input-0", "BYTES", (-1,)),)
    platform = "onnxruntime_onnx"

    def load(self) -> None:
        """Raises ModelMissing, ModelDamaged and DeviceMissing."""
        self.engine = Engine(self.model_dir, self.settings.device, self.settings.threads)
        try:
            self.card = ModelCard.from_properties(self.engine.metadata)
        except (KeyError, ValueError) as error:
            raise ModelDamaged(
                f"{self.model_dir} lacks the metadata that `python -m model_export` writes ({error}); export it again"
            ) from error
        self.warning = self.card.warning
        self.preprocessing = image.Preprocessing(
            self.card.resize_pixels, self.card.crop_pixels, self.card.interpolation, self.card.mean, self.card.std
        )
        self.row_shape = (3, self.card.crop_pixels, self.card.crop_pixels)
        self.outputs = (TensorSpec("output-0", "FP32", (-1, min(TOP, len(self.card.labels)))),)
        self._warm_up()

    def preprocess(self, request: Request) -> Rows:
        """Images or prepared tensors to `pixels`, FP32 [rows, 3, crop, crop]."""
        tensor = request.input
        if tensor.datatype == "BYTES":
            rows = [self._image(tensor.name, row, element) for row, element in enumerate(tensor.array.flat)]
            return {"pixels": np.stack(rows)}
        return {"pixels": self._prepared(tensor)}

    def predict(self, rows: Rows) -> Rows:
        return self.engine.run(rows)

    def postprocess(self, predictions: Rows, request: Request) -> Response:
        logits = predictions["logits"]
        return Response([Tensor("output-0", -np.sort(-logits, axis=1)[:, :TOP])])

    def _warm_up(self) -> None:
        """The first run allocates memory and starts threads, and shows whether the model runs at all."""
        try:
            logits = self.predict({"pixels": np.zeros((1, *self.row_shape), np.float32)})["logits"]
        except Exception as error:  # ONNX Runtime's exceptions have no class in common
            raise ModelDamaged(f"{self.model_dir} does not run ({one_line(error)}); export the model again") from error
        if logits.shape != (1, len(self.card.labels)):
            raise ModelDamaged(f"{self.model_dir} has {logits.shape[-1]} logits for {len(self.card.labels)} labels")

    def _image(self, name: str, row: int, element: bytes) -> NDArray[np.float32]:
        try:
            return self.preprocessing(image.decode(image.image_bytes(element), self.settings.max_image_pixels))
        except (InvalidInput, TooLarge) as error:
            raise type(error)(f"input '{name}', row {row}: {error}") from None

    def _prepared(self, tensor: Tensor) -> NDArray[np.float32]:
        if tensor.datatype not in PREPARED_DATATYPES or tensor.shape[1:] != self.row_shape:
            raise InvalidInput(
                f"input '{tensor.name}' is {tensor.datatype} of shape {list(tensor.shape)}: neither BYTES with an "
                f"image a row, nor FP32 of shape [rows, {', '.join(map(str, self.row_shape))}]"
            )
        with np.errstate(over="ignore"):
            pixels = np.require(tensor.array, np.float32, ["C", "ALIGNED"])  # numbers read in place may be neither
        if not np.isfinite(pixels).all():
            raise InvalidInput(f"input '{tensor.name}' has values that are not finite FP32 numbers")
        return pixels
