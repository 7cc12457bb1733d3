"""pinnace/http/http2_frames.py: what reaches h2 of what a client sends, and how much a client may send."""

from __future__ import annotations

import random

import pytest
from h2.errors import ErrorCodes

from pinnace.http.http2_frames import (
    BURST_EVENTS,
    EARNED_EVENTS,
    EVENTS_PER_SECOND,
    MAX_EARNED_EVENTS,
    PIECE_MICROSECONDS,
    FrameBudget,
    FrameScanner,
    Piece,
)
from tests.attacks.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    UNKNOWN,
    WINDOW_UPDATE,
    make_frame,
)

REQUEST = make_frame(HEADERS, 1, b"block", END_HEADERS)
BODY = make_frame(DATA, 1, bytes(1000)) + make_frame(DATA, 1, flags=END_STREAM)
PRIORITY_FRAME = make_frame(PRIORITY, 3, bytes(5))
ZERO_WINDOW = make_frame(WINDOW_UPDATE, 3, bytes(4))


def scan(*chunks: bytes) -> list[Piece]:
    """Return the pieces of a connection that sends these chunks after the preface."""
    scanner = FrameScanner()
    return [piece for chunk in (PREFACE, *chunks) for piece in scanner.scan(chunk)]


def join(pieces: list[Piece]) -> bytes:
    """Return what h2 reads of the pieces."""
    return b"".join(piece.data for piece in pieces)


def count_events(data: bytes) -> int:
    """Return how many control frames `data` counts as."""
    return sum(piece.events for piece in scan(data))


def test_the_frames_of_a_request_pass_and_do_not_count() -> None:
    pieces = scan(REQUEST + BODY)

    assert join(pieces) == PREFACE + REQUEST + BODY
    assert sum(piece.events for piece in pieces) == 0


@pytest.mark.parametrize("size_bytes", [1, 2, 5, 8, 13, 40])
def test_frames_may_be_split_at_every_byte(size_bytes: int) -> None:
    kept = REQUEST + make_frame(PING, payload=bytes(8)) + make_frame(WINDOW_UPDATE, 1, bytes([0, 0, 0, 1]))
    dropped = PRIORITY_FRAME + make_frame(UNKNOWN, 0, bytes(30)) + ZERO_WINDOW
    data = PREFACE + (kept + dropped + BODY) * 3
    scanner = FrameScanner()

    pieces = [
        piece for start in range(0, len(data), size_bytes) for piece in scanner.scan(data[start : start + size_bytes])
    ]

    assert join(pieces) == PREFACE + (kept + BODY) * 3
    assert sum(piece.events for piece in pieces) == 5 * 3
    assert [piece.reset_stream_id for piece in pieces if piece.reset_stream_id] == [3, 3, 3]


def test_random_cuts_give_the_same_frames() -> None:
    kinds = [REQUEST, BODY, PRIORITY_FRAME, make_frame(SETTINGS), make_frame(UNKNOWN, 0, bytes(300)), ZERO_WINDOW]
    generator = random.Random(0)
    for _ in range(100):
        data = b"".join(generator.choices(kinds, k=30))
        cuts = sorted(generator.sample(range(len(data)), 10))
        chunks = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]

        whole, parts = scan(data), scan(*chunks)

        assert join(whole) == join(parts)
        assert sum(piece.events for piece in whole) == sum(piece.events for piece in parts)


def test_a_flood_is_cut_into_pieces_of_whole_frames() -> None:
    frame = make_frame(SETTINGS)

    pieces = scan(frame * 7000)

    assert join(pieces) == PREFACE + frame * 7000
    assert len(pieces) > 100
    assert all(len(piece.data) % len(frame) == 0 for piece in pieces[1:])
    assert max(piece.microseconds for piece in pieces) <= PIECE_MICROSECONDS
    assert sum(piece.events for piece in pieces) == 7000


def test_a_piece_ends_after_a_long_header_block() -> None:
    long = make_frame(HEADERS, 1, bytes(4000), END_HEADERS)

    assert [piece.data for piece in scan(long + long)] == [PREFACE, long, long]


@pytest.mark.parametrize(
    ("frame", "events"),
    [
        (make_frame(PRIORITY, 1, bytes(5)), 1),
        (make_frame(RST_STREAM, 1, bytes(4)), 0),
        (make_frame(SETTINGS), 1),
        (make_frame(SETTINGS, payload=bytes(6 * 2000)), 188),
        (make_frame(PING, payload=bytes(8)), 1),
        (make_frame(WINDOW_UPDATE, payload=bytes([0, 0, 0, 1])), 1),
        (make_frame(UNKNOWN, payload=bytes(10_000)), 1),
        (make_frame(DATA, 1), 1),
        (make_frame(DATA, 1, flags=END_STREAM), 0),
        (make_frame(HEADERS, 1, bytes(16_000), END_HEADERS), 7),
        (make_frame(HEADERS, 1) + make_frame(CONTINUATION, 1), 1),
    ],
)
def test_a_frame_counts_by_what_it_costs(frame: bytes, events: int) -> None:
    assert count_events(frame) == events


def test_resets_are_counted_apart() -> None:
    pieces = scan(make_frame(RST_STREAM, 1, bytes(4)) * 30 + make_frame(PING, payload=bytes(8)))

    assert sum(piece.resets for piece in pieces) == 30
    assert sum(piece.events for piece in pieces) == 1


def test_frames_within_a_header_block_reach_h2_which_refuses_them() -> None:
    data = make_frame(HEADERS, 1, b"block") + PRIORITY_FRAME + make_frame(UNKNOWN) + ZERO_WINDOW

    assert join(scan(data)) == PREFACE + data


def test_a_frame_that_is_too_long_is_an_error_before_it_is_received() -> None:
    pieces = scan(REQUEST + make_frame(DATA, 1, bytes(16_385))[:9])

    assert join(pieces) == PREFACE + REQUEST
    assert pieces[-1].error is ErrorCodes.FRAME_SIZE_ERROR


def test_a_header_block_that_is_too_long_is_an_error() -> None:
    part = bytes(16_000)
    frames = make_frame(HEADERS, 1, part) + make_frame(CONTINUATION, 1, part) + make_frame(CONTINUATION, 1, part)

    assert [piece.error for piece in scan(frames)][-1] is ErrorCodes.ENHANCE_YOUR_CALM


def test_a_budget_allows_a_burst_and_a_rate() -> None:
    budget = FrameBudget(now=0)

    assert budget.spend(BURST_EVENTS, now=0)
    assert budget.spend(EVENTS_PER_SECOND, now=1)
    assert not budget.spend(1, now=1)


def test_a_budget_that_rests_allows_one_burst() -> None:
    budget = FrameBudget(now=0)

    assert budget.spend(1, now=0)
    assert budget.spend(BURST_EVENTS, now=1e6)
    assert not budget.spend(1, now=1e6)


def test_answers_earn_control_frames_by_their_number_and_size() -> None:
    budget = FrameBudget(now=0)

    budget.earn(100)
    assert budget.spend(BURST_EVENTS + EARNED_EVENTS, now=0)
    budget.earn(1024 * 1024)
    assert budget.spend(512 + EARNED_EVENTS, now=0)
    assert not budget.spend(1, now=0)


def test_earned_control_frames_are_limited() -> None:
    budget = FrameBudget(now=0)

    budget.earn(10**12)

    assert budget.spend(MAX_EARNED_EVENTS, now=0)
    assert not budget.spend(1, now=0)
