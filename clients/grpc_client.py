"""Asks over gRPC what is in pictures: `python -m clients.grpc_client photo.jpg`, from the project's folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from clients.cli import Ask, Classes, ServerError, authorization, run
from pinnace.proto.generated import inference as pb
from pinnace.proto.wire import decode

SERVICE = "inference.GRPCInferenceService"
# A busy server answers UNAVAILABLE, and says after how long to try again; grpc itself waits and does.
RETRIES = {
    "maxAttempts": 4,
    "initialBackoff": "0.5s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[Ask]:
    key = authorization(arguments)
    metadata = (("authorization", key),) if key else ()
    with _channel(arguments) as channel:
        infer: grpc.UnaryUnaryMultiCallable[pb.ModelInferRequest, bytes] = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", request_serializer=bytes
        )

        def ask(picture: bytes) -> Classes:
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
                answer = infer(request, timeout=arguments.timeout_seconds, metadata=metadata)
            except grpc.RpcError as error:
                raise ServerError(f"{arguments.address} answered {error.code().name}: {error.details()}") from None
            labels, probabilities = (tensor.contents for tensor in decode(pb.ModelInferResponse, answer).outputs)
            if labels is None or probabilities is None:
                raise ServerError(f"{arguments.address} answered something else than classes")
            texts = [label.decode() for label in labels.bytes_contents]
            return list(zip(texts, probabilities.fp32_contents, strict=True))

        yield ask


def _channel(arguments: argparse.Namespace) -> grpc.Channel:
    """Raises OSError."""
    config = {"methodConfig": [{"name": [{"service": SERVICE}], "retryPolicy": RETRIES}]}
    options = [("grpc.service_config", json.dumps(config))]
    if arguments.authority:
        options.append(("grpc.default_authority", arguments.authority))
    if not arguments.ssl_ca_certs:
        return grpc.insecure_channel(arguments.address, options)
    credentials = grpc.ssl_channel_credentials(
        arguments.ssl_ca_certs.read_bytes(), _bytes_of(arguments.ssl_keyfile), _bytes_of(arguments.ssl_certfile)
    )
    return grpc.secure_channel(arguments.address, credentials, options)


def _bytes_of(file: Path | None) -> bytes | None:
    return file.read_bytes() if file else None


if __name__ == "__main__":
    sys.exit(run("grpc_client", 8081, connected))
