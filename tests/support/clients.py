"""Requests and calls of REST and gRPC clients."""

from __future__ import annotations

import base64
import json
import struct
from socket import create_connection
from types import ModuleType
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import httpx

from tests.support.servers import Server

PREDICT = "/v1/models/custom-model:predict"
INFER = "/inference.GRPCInferenceService/ModelInfer"


def make_v1_request(*pictures: bytes) -> str:
    """Return the JSON of a V1 request with one instance per encoded picture."""
    return json.dumps({"instances": [{"image": {"b64": base64.b64encode(picture).decode()}} for picture in pictures]})


def predict_over_rest(server: Server, instance: str) -> httpx.Response:
    """Send a V1 request with one instance."""
    return server.predict(json.dumps({"instances": [instance]}))


def make_image_request(google: ModuleType, *pictures: bytes, shape: list[int] | None = None, **fields: Any) -> Any:
    """Return a ModelInferRequest with `pictures` as typed contents of one BYTES input."""
    request = google.ModelInferRequest(**{"model_name": "custom-model", **fields})
    tensor = request.inputs.add(name="input-0", datatype="BYTES", shape=[len(pictures)] if shape is None else shape)
    tensor.contents.bytes_contents.extend(pictures)
    return request


def make_tensor_request(google: ModuleType, pixels: Any, raw: bool) -> Any:
    """Return a ModelInferRequest with one FP32 input, as typed contents or as raw_input_contents."""
    request = google.ModelInferRequest(model_name="custom-model")
    tensor = request.inputs.add(name="INPUT__0", datatype="FP32", shape=pixels.shape)
    if raw:
        request.raw_input_contents.append(pixels.tobytes())
        tensor.parameters["binary_data_size"].int64_param = pixels.nbytes
    else:
        tensor.contents.fp32_contents.extend(pixels.reshape(-1))
    return request


def call_grpc(channel: grpc.Channel, google: ModuleType, method: str, request: Any) -> Any:
    """Call a method of the inference service with google.protobuf's messages."""
    response = getattr(google, f"{method}Response")
    call: grpc.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
        f"/inference.GRPCInferenceService/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=response.FromString,
    )
    return call(request, timeout=60)


def infer_over_grpc(server: Server, google: ModuleType, instance: str) -> Any:
    """Call ModelInfer on the gRPC port with one BYTES element."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        return call_grpc(channel, google, "ModelInfer", make_image_request(google, instance.encode()))


def frame_message(message: bytes, compressed: bool = False) -> bytes:
    """Return `message` behind gRPC's prefix of five bytes."""
    return struct.pack(">BI", compressed, len(message)) + message


def send_raw_call(
    server: Server, body: bytes, path: str = INFER, end: bool = True, port: int = 0, **headers: str
) -> dict[str, str]:
    """Send a gRPC call frame by frame, and return headers and trailers of the response.

    httpx does not give access to trailers. Header names are written with _ for -.
    """
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    trailers: dict[str, str] = {}
    with create_connection(("127.0.0.1", port or server.http_port), timeout=30) as socket:
        connection.initiate_connection()
        pseudo = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "")]
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        connection.send_headers(1, [*pseudo, ("content-type", "application/grpc"), ("te", "trailers"), *named])
        for start in range(0, len(body), 16384):
            connection.send_data(1, body[start : start + 16384])
        if end:
            connection.end_stream(1)
        socket.sendall(connection.data_to_send())
        while True:
            for event in connection.receive_data(socket.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    trailers |= dict(event.headers)  # type: ignore[arg-type]
                if isinstance(event, h2.events.StreamEnded):
                    return trailers
            socket.sendall(connection.data_to_send())
