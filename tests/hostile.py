"""What somebody sends who means no good: small requests that want to be much memory, much time, or a crash."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from dataclasses import dataclass, field

from tests.pictures import CAT, MODES, v1_request

V1 = "/v1/models/custom-model:predict"
V2 = "/v2/models/custom-model/infer"
MIB = 1024 * 1024


@dataclass(frozen=True)
class Hostile:
    """One REST request, and the status that it must be answered with."""

    status: int
    body: bytes
    path: str = V1
    headers: dict[str, str] = field(default_factory=dict)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _gigapixel() -> bytes:
    """Black and white, a bit a pixel: 131 MB that compress to less than 200 kB."""
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(4097) * 64) for _ in range(512))
    return png(32768, 32768, rows + compressor.flush())


def _lying_jpeg(width: int, height: int) -> bytes:
    """The cat, as if it were of that size."""
    return re.sub(
        rb"(\xff\xc0..\x08)....",
        lambda found: found[1] + struct.pack(">HH", height, width),
        MODES["JPEG"],
        count=1,
        flags=re.DOTALL,
    )


def _cleared_gif(width: int, height: int) -> bytes:
    """A GIF of 44 bytes whose frame is to be cleared before the next one is shown."""
    control, frame = b"!\xf9\x04\x08\0\0\0\0", struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + control + b"," + frame + b"\x02\x02\x4c\x01\0;"


def _tensor(shape: list[int], data: object, datatype: str = "FP32") -> bytes:
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

HOSTILE = {
    "a gigapixel": Hostile(413, _gigapixel(), headers=IMAGE),
    "a header of 4 gigapixels": Hostile(413, png(65535, 65535), headers=IMAGE),
    "a JPEG that says 4 gigapixels": Hostile(413, _lying_jpeg(65000, 65000), headers=IMAGE),
    "a PNG that says 49 megapixels and has none": Hostile(400, png(7000, 7000), headers=IMAGE),
    "a GIF that clears 4 gigapixels": Hostile(413, _cleared_gif(65535, 65535), headers=IMAGE),
    "a gigapixel in JSON": Hostile(413, v1_request(_gigapixel()).encode()),
    "a gzip bomb": Hostile(415, gzip.compress(bytes(64 * MIB)), headers={"content-encoding": "gzip"}),
    "JSON nested in lists": Hostile(400, b'{"instances": ' + b"[" * 100_000),
    "JSON nested in lists, closed": Hostile(400, b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "JSON nested in objects": Hostile(400, b'{"instances": [' + b'{"a":' * 50_000),
    "JSON nested as deep as it is read": Hostile(400, b'{"instances": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "a number of a million digits": Hostile(400, b'{"instances": [' + b"9" * 1_000_000 + b"]}"),
    "a million instances": Hostile(413, b'{"instances": [' + b"1," * 999_999 + b"1]}"),
    "lone surrogates": Hostile(400, b'{"instances": ["\\ud800"]}'),
    "not UTF-8": Hostile(400, b'{"instances": ["\xff\xfe"]}'),
    "a key twice": Hostile(400, b'{"instances": [], "instances": 1}'),
    "a shape beyond 2^63": Hostile(400, _tensor([2**32, 2**32, 2**32], [1.0]), V2),
    "a shape of a huge product": Hostile(400, _tensor([2**62, 4], [1.0]), V2),
    "a negative shape": Hostile(400, _tensor([-1, 3, 224, 224], [1.0]), V2),
    "a shape of a million dimensions": Hostile(413, _tensor([1] * 1_000_000, [1.0]), V2),
    "a shape of a thousand dimensions": Hostile(400, _tensor([1] * 1000, [1.0]), V2),
    "a million lists": Hostile(413, b'{"instances": [' + b"[]," * 999_999 + b"[]]}"),
    "a million keys": Hostile(413, b"{" + b",".join(b'"%x":1' % key for key in range(1_000_000)) + b"}"),
    "BYTES of a huge shape": Hostile(400, _tensor([2**40], ["a"], "BYTES"), V2),
    "binary that is not there": Hostile(400, BINARY, V2, {"inference-header-content-length": str(len(BINARY))}),
    "a binary header beyond the body": Hostile(400, BINARY, V2, {"inference-header-content-length": "9" * 30}),
    "BYTES whose length lies": Hostile(
        400,
        (
            head
            := b'{"inputs": [{"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 8}}]}'
        )
        + b"\xff\xff\xff\xffabcd",
        V2,
        {"inference-header-content-length": str(len(head))},
    ),
    "an unknown type": Hostile(415, b"a=b", headers={"content-type": "multipart/form-data"}),
    "a truncated picture": Hostile(400, CAT[: len(CAT) // 2], headers=IMAGE),
    "base64 that is none": Hostile(400, b'{"instances": [{"image": {"b64": "%s"}}]}' % (b"*" * 100_000)),
    "no model of that name": Hostile(404, b"{}", "/v1/models/" + "x" * 8000 + ":predict"),
    "a path that climbs": Hostile(404, b"{}", "/v1/models/..%2F..%2Fetc%2Fpasswd:predict"),
}


def _nested(depth: int) -> bytes:
    """Inputs within inputs, each with its right length: the schema stops at the first."""
    message = b""
    for _ in range(depth):
        length, digits = len(message), b""
        while length > 0x7F:
            digits, length = digits + bytes([length & 0x7F | 0x80]), length >> 7
        message = b"\x2a" + digits + bytes([length]) + message
    return message


MODEL = b"\x0a\x0ccustom-model"
MESSAGES = {
    "groups nested": MODEL + b"\x0b" * 10_000,
    "groups nested in an unknown field": MODEL + b"\x7b" * 10_000 + b"\x7c" * 10_000,
    "messages nested 10,000 deep": MODEL + _nested(10_000),
    "messages nested and cut off": MODEL + b"\x2a\x80\x80\x01" * 10_000,
    "a length beyond the end": MODEL + b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "a varint without end": MODEL + b"\x40" + b"\xff" * 100_000,
    "a million empty inputs": MODEL + b"\x2a\x00" * 1_000_000,
    "a million empty tensors": MODEL + b"\x3a\x00" * 1_000_000,
    "a million unknown fields": MODEL + b"\x40\x00" * 1_000_000,
    "field number 0": MODEL + b"\x02\x00",
    "a name that is not UTF-8": b"\x0a\x02\xff\xfe",
}
"""Of ModelInfer; each is an INVALID_ARGUMENT."""

COMPRESSED_BOMB = gzip.compress(bytes(32 * MIB))
