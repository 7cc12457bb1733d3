"""HTTP/2 frames: cut what a client sends into pieces that take h2 about a millisecond, and count its control frames.

h2 handles everything that it is given before it returns, on the event loop: a read of 64 KiB takes 95 to 210 ms if it
is full of SETTINGS frames (13 to 29 µs per frame of 9 bytes, measured). h2 has no limit on the number of frames, so a
client can repeat that for ever. The headers of the frames are therefore read here first, which takes 1 µs per frame.
RFC 9113, section 10.5, names the frames that can be abused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from h2.errors import ErrorCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE_BYTES = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
FRAME_HEADER = struct.Struct(">BHBBI")  # length in two parts, type, flags, stream
WINDOW_UPDATE_BYTES = 4
END_STREAM, END_HEADERS = 0x1, 0x4

MAX_FRAME_BYTES = 16384  # HTTP/2's default, and what h2 advertises
MAX_HEADER_BLOCK_BYTES = 32 * 1024  # as sent; h2 decodes up to 2.2 bytes per µs (measured)

PIECE_MICROSECONDS = 1000
# What h2 and Hypercorn take per frame and per byte of it, rounded up from measurements. One byte of a header block can
# refer to a whole field.
MICROSECONDS = {
    HeadersFrame.type: (1000, 2.5),
    ContinuationFrame.type: (20, 2.5),
    DataFrame.type: (100, 0.005),
    RstStreamFrame.type: (100, 0),
    SettingsFrame.type: (50, 0.1),
}
OTHER_MICROSECONDS = (20, 0)

# The bytes of a frame that count as one control frame more. h2 takes 0.07 µs per byte of SETTINGS, and up to 0.45 µs
# per byte of compressed headers (measured).
BYTES_PER_EVENT = {SettingsFrame.type: 64, HeadersFrame.type: 2048, ContinuationFrame.type: 2048}

# nghttp2 allows bursts of 1,000 resets and 33 per second after that, Envoy 500 in all.
BURST_EVENTS = 1000
EVENTS_PER_SECOND = 100
EARNED_EVENTS = 4  # per answer: two WINDOW_UPDATE frames, a PING of grpc-go, and one to spare
BYTES_PER_EARNED_EVENT = 2048  # Go sends two WINDOW_UPDATE frames for 4 KiB
MAX_EARNED_EVENTS = 100_000


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of what was received: whole frames, the end of one, or its beginning.

    Attributes:
        data: What h2 is to read.
        events: The number of control frames in it, without those that reset a stream.
        resets: The number of frames that reset a stream.
        microseconds: An estimate of how long it takes.
        reset_stream_id: The stream to reset afterwards, for a WINDOW_UPDATE of 0; else 0.
        error: The error to close the connection with afterwards.
    """

    data: bytes
    events: int
    resets: int
    microseconds: float
    reset_stream_id: int = 0
    error: ErrorCodes | None = None


class FrameScanner:
    """Cuts what a client sends on one connection into pieces of about a millisecond.

    PRIORITY frames (RFC 9113, section 5.3.2) and frames of unknown types (section 4.1) are counted and left out. A
    WINDOW_UPDATE of 0 on a stream is left out, and the piece says which stream to reset (section 6.9): h2 would close
    the connection.
    """

    def __init__(self) -> None:
        self._partial_header = b""
        self._remaining_bytes = PREFACE_BYTES
        self._skipping = False
        self._block_bytes = 0  # of the header block that has begun and not ended

    def scan(self, data: bytes) -> Iterator[Piece]:
        """Yield the pieces of `data`, which continues what was scanned before."""
        if self._partial_header:
            data, self._partial_header = self._partial_header + data, b""
        kept: list[bytes] = []
        start = position = events = resets = 0
        microseconds = 0.0

        while position < len(data):
            if self._remaining_bytes:
                end = min(position + self._remaining_bytes, len(data))
                self._remaining_bytes -= end - position
                position = end
                if self._skipping:
                    start = position
                continue
            if microseconds >= PIECE_MICROSECONDS:
                kept.append(data[start:position])
                yield Piece(b"".join(kept), events, resets, microseconds)
                kept, start, events, resets, microseconds = [], position, 0, 0, 0.0
            if len(data) - position < FRAME_HEADER.size:
                break
            high, low, kind, flags, stream_id = FRAME_HEADER.unpack_from(data, position)
            length, stream_id, payload = high << 16 | low, stream_id % 2**31, position + FRAME_HEADER.size
            is_window_update = kind == WindowUpdateFrame.type and length == WINDOW_UPDATE_BYTES
            if is_window_update and len(data) - payload < WINDOW_UPDATE_BYTES:
                break
            fixed, per_byte = MICROSECONDS.get(kind, OTHER_MICROSECONDS)
            microseconds += fixed + per_byte * length
            events += _count_events(kind, flags, length)
            resets += kind == RstStreamFrame.type
            error = self._check_length(kind, flags, length)
            is_zero = is_window_update and stream_id and not self._block_bytes and not _increment(data, payload)
            self._skipping = bool(is_zero or error or self._is_ignored(kind, length, stream_id))
            if self._skipping:
                kept.append(data[start:position])
            if error or is_zero:
                yield Piece(b"".join(kept), events, resets, microseconds, stream_id if is_zero else 0, error)
                if error:
                    return
                kept, events, resets, microseconds = [], 0, 0, 0.0
            self._remaining_bytes = length
            position = payload
            if self._skipping:
                start = position

        self._partial_header = data[position:]
        kept.append(data[start:position])
        if events or any(kept):
            yield Piece(b"".join(kept), events, resets, microseconds)

    def _check_length(self, kind: int, flags: int, length: int) -> ErrorCodes | None:
        """Return an error if the frame or its header block is too long. h2 would wait for 16 MiB of a frame first."""
        if length > MAX_FRAME_BYTES:
            return ErrorCodes.FRAME_SIZE_ERROR
        if kind in (HeadersFrame.type, ContinuationFrame.type):
            block_bytes = self._block_bytes + length
            if block_bytes > MAX_HEADER_BLOCK_BYTES:
                return ErrorCodes.ENHANCE_YOUR_CALM
            self._block_bytes = 0 if flags & END_HEADERS else max(1, block_bytes)
        return None

    def _is_ignored(self, kind: int, length: int, stream_id: int) -> bool:
        """Return whether the frame may be ignored. h2 sees those that are errors, as any within a header block is."""
        if self._block_bytes:
            return False
        if kind == PriorityFrame.type:
            return stream_id > 0 and length == 5
        return kind > ContinuationFrame.type


class FrameBudget:
    """How many control frames, or resets, a connection may still send: a token bucket.

    It is filled by time and, for control frames, by answers. Good clients send most of these because of an answer: they
    open windows and measure the round-trip time.
    """

    def __init__(self, now: float) -> None:
        self._events = float(BURST_EVENTS)
        self._filled_at = now

    def spend(self, events: int, now: float) -> bool:
        """Return whether the client may send this many control frames at the time `now`, in seconds."""
        if self._events < BURST_EVENTS:
            self._events = min(BURST_EVENTS, self._events + (now - self._filled_at) * EVENTS_PER_SECOND)
        self._filled_at = now
        self._events -= events
        return self._events >= 0

    def earn(self, answer_bytes: int) -> None:
        """Allow the control frames that a client sends because of an answer, or a message of it, of this size."""
        earned = EARNED_EVENTS + answer_bytes // BYTES_PER_EARNED_EVENT
        self._events = min(self._events + earned, MAX_EARNED_EVENTS)


def _count_events(kind: int, flags: int, length: int) -> int:
    """Return how many control frames the frame counts as. A request's own frames do not count, unless they are long."""
    if kind == RstStreamFrame.type:
        return 0
    is_request = kind == HeadersFrame.type or (kind == DataFrame.type and (length or flags & END_STREAM))
    long = length // BYTES_PER_EVENT[kind] if kind in BYTES_PER_EVENT else 0
    return long if is_request else long + 1


def _increment(data: bytes, payload: int) -> int:
    return int.from_bytes(data[payload : payload + WINDOW_UPDATE_BYTES], "big") % 2**31
