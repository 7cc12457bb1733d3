"""The same picture in every form that the server takes."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pinnace.proto.generated import inference as pb

MODEL = "custom-model"


@dataclass(frozen=True)
class Payload:
    """`path` is an address below the server's; for gRPC it is empty and the body is a ModelInferRequest."""

    name: str
    body: bytes
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def picture(request: Path) -> bytes:
    """The picture in a V1 request such as the tutorial's."""
    return base64.b64decode(json.loads(request.read_text())["instances"][0]["image"]["b64"])


def payloads(request: Path) -> list[Payload]:
    image, v1, infer = picture(request), f"/v1/models/{MODEL}:predict", f"/v2/models/{MODEL}/infer"
    raw = struct.pack("<I", len(image)) + image
    tensor = {"name": "input-0", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    pixels = np.zeros((1, 3, 224, 224), np.float32)
    return [
        Payload("V1 JSON", request.read_bytes(), v1, {"content-type": "application/json"}),
        Payload("V1 image", image, v1, {"content-type": "image/jpeg"}),
        Payload("V2 binary", header + raw, infer, {"inference-header-content-length": str(len(header))}),
        Payload("gRPC bytes", _message("BYTES", [1], raw)),
        Payload("gRPC raw tensor", _message("FP32", list(pixels.shape), pixels.tobytes())),
    ]


def _message(datatype: str, shape: list[int], raw: bytes) -> bytes:
    tensor = pb.ModelInferRequestInferInputTensor(name="input-0", datatype=datatype, shape=shape)
    return bytes(pb.ModelInferRequest(model_name=MODEL, inputs=[tensor], raw_input_contents=[raw]))
