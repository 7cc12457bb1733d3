"""Hostile requests: small ones that try to cost much memory or time, or to crash the server."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from dataclasses import dataclass, field

from tests.support.clients import PREDICT, make_v1_request
from tests.support.pictures import CAT, MODES

V2_INFER = "/v2/models/custom-model/infer"
MIB = 1024 * 1024


@dataclass(frozen=True)
class HostileRequest:
    """A REST request and the status that the server must answer."""

    status: int
    body: bytes
    path: str = PREDICT
    headers: dict[str, str] = field(default_factory=dict)


def make_png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a black-and-white PNG that claims this size; `data` is its compressed rows."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _make_cleared_gif(width: int, height: int) -> bytes:
    """Return a GIF of 44 bytes whose frame is cleared before the next one is shown."""
    control, frame = b"!\xf9\x04\x08\0\0\0\0", struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + control + b"," + frame + b"\x02\x02\x4c\x01\0;"


def _make_gigapixel() -> bytes:
    """Return a PNG with one bit per pixel: 131 MB that compress to less than 200 kB."""
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(4097) * 64) for _ in range(512))
    return make_png(32768, 32768, rows + compressor.flush())


def _make_lying_jpeg(width: int, height: int) -> bytes:
    """Return the cat with a header that claims this size."""
    return re.sub(
        rb"(\xff\xc0..\x08)....",
        lambda found: found[1] + struct.pack(">HH", height, width),
        MODES["JPEG"],
        count=1,
        flags=re.DOTALL,
    )


def _make_tensor_request(shape: list[int], data: object, datatype: str = "FP32") -> bytes:
    tensor = {"name": "input-0", "datatype": datatype, "shape": shape, "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


IMAGE = {"content-type": "image/png"}
BINARY = json.dumps(
    {
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [1, 3, 224, 224], "parameters": {"binary_data_size": 2**62}}
        ]
    }
).encode()

HOSTILE_REQUESTS = {
    "a gigapixel": HostileRequest(413, _make_gigapixel(), headers=IMAGE),
    "a header of 4 gigapixels": HostileRequest(413, make_png(65535, 65535), headers=IMAGE),
    "a JPEG that claims 4 gigapixels": HostileRequest(413, _make_lying_jpeg(65000, 65000), headers=IMAGE),
    "a PNG that claims 49 megapixels and has none": HostileRequest(400, make_png(7000, 7000), headers=IMAGE),
    "a GIF that clears 4 gigapixels": HostileRequest(413, _make_cleared_gif(65535, 65535), headers=IMAGE),
    "a gigapixel in JSON": HostileRequest(413, make_v1_request(_make_gigapixel()).encode()),
    "a gzip bomb": HostileRequest(415, gzip.compress(bytes(64 * MIB)), headers={"content-encoding": "gzip"}),
    "JSON nested in lists": HostileRequest(400, b'{"instances": ' + b"[" * 100_000),
    "JSON nested in lists, closed": HostileRequest(400, b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "JSON nested in objects": HostileRequest(400, b'{"instances": [' + b'{"a":' * 50_000),
    "JSON nested as deep as it is read": HostileRequest(400, b'{"instances": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "a number of a million digits": HostileRequest(400, b'{"instances": [' + b"9" * 1_000_000 + b"]}"),
    "a million instances": HostileRequest(413, b'{"instances": [' + b"1," * 999_999 + b"1]}"),
    "lone surrogates": HostileRequest(400, b'{"instances": ["\\ud800"]}'),
    "not UTF-8": HostileRequest(400, b'{"instances": ["\xff\xfe"]}'),
    "a key twice": HostileRequest(400, b'{"instances": [], "instances": 1}'),
    "a shape beyond 2^63": HostileRequest(400, _make_tensor_request([2**32, 2**32, 2**32], [1.0]), V2_INFER),
    "a shape of a huge product": HostileRequest(400, _make_tensor_request([2**62, 4], [1.0]), V2_INFER),
    "a negative shape": HostileRequest(400, _make_tensor_request([-1, 3, 224, 224], [1.0]), V2_INFER),
    "a shape of a million dimensions": HostileRequest(413, _make_tensor_request([1] * 1_000_000, [1.0]), V2_INFER),
    "a shape of a thousand dimensions": HostileRequest(400, _make_tensor_request([1] * 1000, [1.0]), V2_INFER),
    "a million lists": HostileRequest(413, b'{"instances": [' + b"[]," * 999_999 + b"[]]}"),
    "a million keys": HostileRequest(413, b"{" + b",".join(b'"%x":1' % key for key in range(1_000_000)) + b"}"),
    "BYTES of a huge shape": HostileRequest(400, _make_tensor_request([2**40], ["a"], "BYTES"), V2_INFER),
    "missing binary data": HostileRequest(400, BINARY, V2_INFER, {"inference-header-content-length": str(len(BINARY))}),
    "a binary header beyond the body": HostileRequest(
        400, BINARY, V2_INFER, {"inference-header-content-length": "9" * 30}
    ),
    "BYTES with a false length": HostileRequest(
        400,
        (
            head
            := b'{"inputs": [{"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 8}}]}'
        )
        + b"\xff\xff\xff\xffabcd",
        V2_INFER,
        {"inference-header-content-length": str(len(head))},
    ),
    "an unknown type": HostileRequest(415, b"a=b", headers={"content-type": "multipart/form-data"}),
    "a truncated picture": HostileRequest(400, CAT[: len(CAT) // 2], headers=IMAGE),
    "invalid base64": HostileRequest(400, b'{"instances": [{"image": {"b64": "%s"}}]}' % (b"*" * 100_000)),
    "no model of that name": HostileRequest(404, b"{}", "/v1/models/" + "x" * 8000 + ":predict"),
    "a path that climbs": HostileRequest(404, b"{}", "/v1/models/..%2F..%2Fetc%2Fpasswd:predict"),
}


def _nest_messages(depth: int) -> bytes:
    """Return inputs within inputs, each with its correct length. The schema allows one level."""
    message = b""
    for _ in range(depth):
        length, digits = len(message), b""
        while length > 0x7F:
            digits, length = digits + bytes([length & 0x7F | 0x80]), length >> 7
        message = b"\x2a" + digits + bytes([length]) + message
    return message


MODEL = b"\x0a\x0ccustom-model"
HOSTILE_MESSAGES = {
    "groups nested": MODEL + b"\x0b" * 10_000,
    "groups nested in an unknown field": MODEL + b"\x7b" * 10_000 + b"\x7c" * 10_000,
    "messages nested 10,000 deep": MODEL + _nest_messages(10_000),
    "messages nested and cut off": MODEL + b"\x2a\x80\x80\x01" * 10_000,
    "a length beyond the end": MODEL + b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "an endless varint": MODEL + b"\x40" + b"\xff" * 100_000,
    "a million empty inputs": MODEL + b"\x2a\x00" * 1_000_000,
    "a million empty tensors": MODEL + b"\x3a\x00" * 1_000_000,
    "a million unknown fields": MODEL + b"\x40\x00" * 1_000_000,
    "field number 0": MODEL + b"\x02\x00",
    "a name that is not UTF-8": b"\x0a\x02\xff\xfe",
}
"""Messages for ModelInfer. The answer to each is INVALID_ARGUMENT."""

COMPRESSED_BOMB = gzip.compress(bytes(32 * MIB))
