"""gRPC client: `python -m clients.grpc_client photo.jpg`, run in the project's directory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from clients.cli import Classes, Classify, ServerError, authorization, run
from pinnace.proto.generated import inference as pb
from pinnace.proto.wire import decode

SERVICE = "inference.GRPCInferenceService"
# A busy server answers UNAVAILABLE with the time to wait (grpc-retry-pushback-ms); grpc waits and retries by itself.
RETRIES = {
    "maxAttempts": 4,
    "initialBackoff": "0.5s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[Classify]:
    """Open a channel, and yield the function that classifies a picture over it. Raises OSError."""
    header = authorization(arguments)
    metadata = (("authorization", header),) if header else ()
    with _open_channel(arguments) as channel:
        infer: grpc.UnaryUnaryMultiCallable[pb.ModelInferRequest, bytes] = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", request_serializer=bytes
        )

        def classify(picture: bytes) -> Classes:
            contents = pb.InferTensorContents(bytes_contents=[picture])
            request = pb.ModelInferRequest(
                model_name=arguments.model_name,
                inputs=[
                    pb.ModelInferRequestInferInputTensor(name="input-0", datatype="BYTES", shape=[1], contents=contents)
                ],
                outputs=[
                    pb.ModelInferRequestInferRequestedOutputTensor(name=name) for name in ("labels", "probabilities")
                ],
            )
            try:
                response = infer(request, timeout=arguments.timeout_seconds, metadata=metadata)
            except grpc.RpcError as error:
                raise ServerError(f"{arguments.address} answered {error.code().name}: {error.details()}") from None
            labels, probabilities = (tensor.contents for tensor in decode(pb.ModelInferResponse, response).outputs)
            if labels is None or probabilities is None:
                raise ServerError(f"{arguments.address} did not answer with classes: see --model_name")
            texts = [label.decode() for label in labels.bytes_contents]
            return list(zip(texts, probabilities.fp32_contents, strict=True))

        yield classify


def _open_channel(arguments: argparse.Namespace) -> grpc.Channel:
    """Return a channel to the server, with TLS if --ssl_ca_certs is given. Raises OSError."""
    config = {"methodConfig": [{"name": [{"service": SERVICE}], "retryPolicy": RETRIES}]}
    options = [("grpc.service_config", json.dumps(config))]
    if arguments.authority:
        options.append(("grpc.default_authority", arguments.authority))
    if not arguments.ssl_ca_certs:
        return grpc.insecure_channel(arguments.address, options)
    credentials = grpc.ssl_channel_credentials(
        arguments.ssl_ca_certs.read_bytes(),
        _read_optional(arguments.ssl_keyfile),
        _read_optional(arguments.ssl_certfile),
    )
    return grpc.secure_channel(arguments.address, credentials, options)


def _read_optional(file: Path | None) -> bytes | None:
    return file.read_bytes() if file else None


if __name__ == "__main__":
    sys.exit(run("grpc_client", 8081, connect))
