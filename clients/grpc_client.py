"""Sends pictures over gRPC: `python -m clients.grpc_client photo.jpg` or `… input.json`, from the project's folder.

INGRESS_HOST, INGRESS_PORT, SERVICE_HOSTNAME and MODEL_NAME say where to, as in KServe's tutorial; without them it is
the model custom-model on localhost:8081.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path

import grpc

from proto.generated import inference as pb
from proto.wire import decode

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_SECONDS = 60


def read_pictures(path: Path) -> list[bytes]:
    """The pictures of a V1 or V2 request in JSON, or the one that the file is."""
    if path.suffix != ".json":
        return [path.read_bytes()]
    request = json.loads(path.read_text())
    if "instances" in request:
        texts = [instance["image"]["b64"] for instance in request["instances"]]
    else:
        texts = [text for tensor in request["inputs"] for text in tensor["data"]]
    return [base64.b64decode(text) for text in texts]


def infer(address: str, authority: str, model_name: str, pictures: list[bytes]) -> pb.ModelInferResponse:
    """`authority` is the host that a gateway routes by; raises grpc.RpcError."""
    request = pb.ModelInferRequest(
        model_name=model_name,
        inputs=[
            pb.ModelInferRequestInferInputTensor(
                name="input-0",
                datatype="BYTES",
                shape=[len(pictures)],
                contents=pb.InferTensorContents(bytes_contents=pictures),
            )
        ],
    )
    options = [("grpc.default_authority", authority)] if authority else []
    with grpc.insecure_channel(address, options=options) as channel:
        call: grpc.UnaryUnaryMultiCallable[pb.ModelInferRequest, bytes] = channel.unary_unary(
            METHOD, request_serializer=bytes
        )
        return decode(pb.ModelInferResponse, call(request, timeout=TIMEOUT_SECONDS))


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m clients.grpc_client PICTURE|input.json\n")
        return 2
    address = f"{os.environ.get('INGRESS_HOST', 'localhost')}:{os.environ.get('INGRESS_PORT', '8081')}"
    model_name = os.environ.get("MODEL_NAME", "custom-model")
    started = time.monotonic()
    try:
        pictures = read_pictures(Path(sys.argv[1]))
        response = infer(address, os.environ.get("SERVICE_HOSTNAME", ""), model_name, pictures)
    except OSError as error:
        sys.stderr.write(f"grpc_client: {error.filename}: {error.strerror}\n")
        return 1
    except (KeyError, TypeError, ValueError):
        sys.stderr.write(f"grpc_client: {sys.argv[1]} is neither a picture nor a V1 or V2 request in JSON\n")
        return 1
    except grpc.RpcError as error:
        sys.stderr.write(f"grpc_client: {address} answered {error.code().name}: {error.details()}\n")
        return 1
    print(f"{response.model_name} answered {response.id} in {(time.monotonic() - started) * 1000:.0f} ms")
    for tensor in response.outputs:
        values = tensor.contents.fp32_contents if tensor.contents else []
        print(f"{tensor.name} {tensor.datatype} {list(tensor.shape)} {list(values)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
