"""Request bodies: the same image in every form that the server accepts."""

from __future__ import annotations

import argparse
import base64
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pinnace.proto.generated import inference as pb

MODEL_NAME = "custom-model"


@dataclass(frozen=True)
class Payload:
    """A request to send. `path` is the URL's path; it is empty for gRPC, where `body` is a ModelInferRequest."""

    name: str
    body: bytes
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def add_request_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--request`, which names the file that the payloads are made from."""
    parser.add_argument(
        "--request",
        type=Path,
        default=Path("examples/input.json"),
        help="file with a V1 request with an image (default %(default)s)",
    )


def read_image(request: Path) -> bytes:
    """Return the encoded image in a file with a V1 request, such as the tutorial's."""
    return base64.b64decode(json.loads(request.read_text())["instances"][0]["image"]["b64"])


def make_payloads(request: Path) -> list[Payload]:
    """Return a payload per protocol and encoding, with the image in the V1 request `request`."""
    image = read_image(request)
    v1, v2 = f"/v1/models/{MODEL_NAME}:predict", f"/v2/models/{MODEL_NAME}/infer"
    raw = struct.pack("<I", len(image)) + image
    tensor = {"name": "input-0", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    pixels = np.zeros((1, 3, 224, 224), np.float32)
    return [
        Payload("V1 JSON", request.read_bytes(), v1, {"content-type": "application/json"}),
        Payload("V1 image", image, v1, {"content-type": "image/jpeg"}),
        Payload("V2 binary", header + raw, v2, {"inference-header-content-length": str(len(header))}),
        Payload("gRPC bytes", _grpc_message("BYTES", [1], raw)),
        Payload("gRPC raw tensor", _grpc_message("FP32", list(pixels.shape), pixels.tobytes())),
    ]


def _grpc_message(datatype: str, shape: list[int], raw: bytes) -> bytes:
    tensor = pb.ModelInferRequestInferInputTensor(name="input-0", datatype=datatype, shape=shape)
    return bytes(pb.ModelInferRequest(model_name=MODEL_NAME, inputs=[tensor], raw_input_contents=[raw]))
