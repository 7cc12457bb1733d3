"""Fixes for HTTP/2 in Hypercorn 0.18 and h2 4: limits on control frames, and errors that reset one stream only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    RequestReceived,
    StreamReset,
    WindowUpdated,
)
from h2.events import Event as Http2Event
from h2.exceptions import InvalidBodyLengthError, ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings
from hpack.exceptions import HPACKError
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hyperframe.frame import DataFrame, Frame, HeadersFrame, RstStreamFrame
from priority.priority import PriorityTree

from pinnace.http.http2_frames import PIECE_MICROSECONDS, FrameBudget, FrameScanner, Piece

logger = logging.getLogger(__name__)

METHOD_NOT_ALLOWED = [(b":status", b"405"), (b"allow", b"GET, HEAD, POST"), (b"content-length", b"0")]
MAX_FIELDS = 100  # of a header block that counts as no control frame; Envoy's and Apache's limit
FIELDS_PER_EVENT = 10
SHORT_DATA_BYTES = 256


class Http2Connection(H2Connection):
    """h2's state of one connection, in which an error of a stream resets that stream only.

    It fixes these faults of h2:

    - A malformed request ends the connection, and everybody's requests on it, where RFC 9113, section 8.1.1, demands
      that only its stream is reset: a blank at the end of a field's value, a field name in upper case, a missing
      pseudo-header, a body of another length than content-length says. The header block has been decoded by then, so
      that the next one can be.
    - A stream beyond the limit ends the connection: https://github.com/pgjones/hypercorn/issues/335. Here it is refused
      (section 5.1.2), and clients may retry it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(H2Configuration(client_side=False, header_encoding=None))
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: config.h2_max_concurrent_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: config.h2_max_header_list_size,
            },
        )
        # h2 limits header blocks once the client has acknowledged the settings, which it may never do.
        self.decoder.max_header_list_size = config.h2_max_header_list_size
        self.unearned_events = 0  # frames that a client sent for nothing, since they were last charged
        self._open_streams_before = 0

    @property
    def open_inbound_streams(self) -> int:
        """Return 0, so that h2 does not close the connection for a stream too many."""
        self._open_streams_before = super().open_inbound_streams
        return 0

    def reset_stream(self, stream_id: int, error_code: ErrorCodes | int = ErrorCodes.REFUSED_STREAM) -> None:
        """Reset the stream, unless the client has reset it. Hypercorn gives no code when it stops."""
        with suppress(StreamClosedError):
            super().reset_stream(stream_id, error_code)

    def _receive_frame(self, frame: Frame) -> list[Http2Event]:
        is_new = frame.stream_id not in self.streams
        try:
            events = super()._receive_frame(frame)
        except ProtocolError as error:
            if not self._is_stream_error(frame, error):
                raise
            return self._reset(frame, ErrorCodes.PROTOCOL_ERROR)
        if isinstance(frame, HeadersFrame) and is_new:
            if self._open_streams_before >= self.local_settings.max_concurrent_streams:
                return self._reset(frame, ErrorCodes.REFUSED_STREAM)
        elif isinstance(frame, DataFrame) and not any(isinstance(event, DataReceived) for event in events):
            self.unearned_events += 1  # h2 has answered with a RST_STREAM
        return events

    def _is_stream_error(self, frame: Frame, error: ProtocolError) -> bool:
        """Return whether the frame was malformed, on a stream that exists, and the header block could be decoded."""
        return (
            isinstance(frame, HeadersFrame | DataFrame)
            and type(error) in (ProtocolError, InvalidBodyLengthError)
            and not isinstance(error.__cause__, HPACKError)
            and frame.stream_id in self.streams
            and self.state_machine.state is not ConnectionState.CLOSED
        )

    def _reset(self, frame: Frame, error_code: ErrorCodes) -> list[Http2Event]:
        self.unearned_events += 1
        if isinstance(frame, DataFrame):  # what nobody reads must not use up the connection's window
            self.acknowledge_received_data(frame.flow_controlled_length, frame.stream_id)
        try:
            super().reset_stream(frame.stream_id, error_code)
        except ProtocolError:  # for h2 a request that has a :status was never a stream
            reset = RstStreamFrame(frame.stream_id, error_code=error_code)
            self._prepare_for_sending([reset])
        return [StreamReset(stream_id=frame.stream_id, error_code=error_code, remote_reset=False)]


class Http2Config(Config):
    """Hypercorn's configuration, and the turns that all its HTTP/2 connections take."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = asyncio.Lock()

    async def take_turn(self) -> None:
        """Let the event loop run everything else. Of those that wait, one returns per turn of the loop, in order."""
        async with self._turn:
            await asyncio.sleep(0)


class PatchedH2Protocol(H2Protocol):
    """One HTTP/2 connection. Neither a failing stream nor a flood of frames affects the others.

    It fixes these faults of Hypercorn:

    - What a read contains is handled without a pause, and without a limit on its control frames. Here it is handled in
      pieces of about a millisecond, of which all connections together get one per turn of the event loop. A client
      that sends more control frames than any good one is disconnected with ENHANCE_YOUR_CALM.
    - A method CONNECT raises UnboundLocalError, and the requests beside it never end. Here it gets 405.
    - A method or path that is not ASCII raises UnicodeDecodeError, which ends the connection. Here it resets its
      stream, as does a content-length without a body, which h2 does not see.
    - A connection counts as busy before its first request, and for ever if the client resets its last one. It is not
      closed when it is idle, and a stop waits for it. Here it is idle.
    - In Hypercorn, data for a request that was refused, or answered before its body was read, raises KeyError and ends
      the whole connection: https://github.com/pgjones/hypercorn/issues/329. Here such data is dropped.
    - While stopping, Hypercorn resets new streams with NO_ERROR, as if they had been answered; clients do not retry
      those. Here the code is REFUSED_STREAM (RFC 9113, section 8.7), which clients may retry.
    - A change of the connection's window makes Hypercorn try to send on every stream, once per frame. Here it tries
      those that have something to send, once per piece.
    """

    config: Http2Config

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection: Http2Connection = Http2Connection(self.config)
        # A stream that was reset stays in the tree until the sending task has seen it.
        self.priority = PriorityTree(2 * self.config.h2_max_concurrent_streams)
        self.streams = _Streams()
        self._scanner = FrameScanner()
        self._budget = FrameBudget(self.context.time())
        self._reset_budget = FrameBudget(self.context.time())
        self._microseconds = 0.0  # that were used since this connection last waited for its turn

    async def initiate(self, headers: Any = None, settings: bytes | None = None) -> None:
        """Begin the connection, which has no request in flight."""
        await super().initiate(headers, settings)
        await self.send(Updated(idle=self.idle))

    async def handle(self, event: Event) -> None:
        """Handle what was received, or the end of the connection. What is received after that is dropped."""
        if not isinstance(event, RawData):
            await super().handle(event)
            return
        for piece in self._scanner.scan(event.data):
            if self._microseconds >= PIECE_MICROSECONDS:
                self._microseconds = 0.0
                await self.config.take_turn()
            if self.closed:
                return
            self._microseconds += piece.microseconds
            await self._handle_piece(piece)

    async def _handle_piece(self, piece: Piece) -> None:
        now = self.context.time()
        if not self._budget.spend(piece.events, now) or not self._reset_budget.spend(piece.resets, now):
            await self._close(ErrorCodes.ENHANCE_YOUR_CALM)
            return
        try:
            events = self.connection.receive_data(piece.data)
        except ProtocolError:  # h2 has written a GOAWAY
            await self._disconnect()
            return
        await self._handle_events(events)
        if piece.reset_stream_id:
            await self._reset_stream(piece.reset_stream_id)
        unearned_events, self.connection.unearned_events = self.connection.unearned_events, 0
        if piece.error:
            await self._close(piece.error)
        elif not self._budget.spend(unearned_events, now):
            await self._close(ErrorCodes.ENHANCE_YOUR_CALM)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send an event of a stream, unless the connection is closed."""
        if self.closed:
            if isinstance(event, StreamClosed):
                await self._close_stream(event.stream_id)
            return
        if isinstance(event, Body) and event.stream_id in self.streams:
            self._budget.earn(len(event.data))
        await super().stream_send(event)

    async def _handle_events(self, events: Sequence[Http2Event]) -> None:
        accepted: list[Http2Event] = []
        unblocked: set[int] = set()
        for event in events:
            if isinstance(event, RequestReceived):
                if self._accept(event):
                    accepted.append(event)
            elif isinstance(event, WindowUpdated):
                unblocked.add(event.stream_id or 0)
            elif isinstance(event, RemoteSettingsChanged):
                unblocked.add(0)
            elif isinstance(event, DataReceived) and event.stream_id not in self.streams:
                self.connection.unearned_events += event.flow_controlled_length < SHORT_DATA_BYTES
                accepted.append(event)
            elif not isinstance(event, PriorityUpdated):  # RFC 9113, section 5.3.2
                accepted.append(event)
        await super()._handle_events(accepted)
        if self.idle and any(isinstance(event, StreamReset) for event in accepted):
            await self.send(Updated(idle=True))
        if 0 in unblocked:
            unblocked = {id for id, buffer in self.stream_buffers.items() if buffer.buffer or buffer.complete}
        for stream_id in unblocked:
            await self._window_updated(stream_id)

    def _accept(self, request: RequestReceived) -> bool:
        """Return whether Hypercorn may see the request. If not, it is answered or reset."""
        self.connection.unearned_events += max(0, len(request.headers) - MAX_FIELDS) // FIELDS_PER_EVENT
        fields = dict(request.headers)
        lacks_body = bool(request.stream_ended) and int(fields.get(b"content-length", 0)) > 0
        with suppress(ProtocolError):  # the client has reset the stream meanwhile
            if self.context.terminated.is_set():
                self.connection.reset_stream(request.stream_id, ErrorCodes.REFUSED_STREAM)
            elif fields[b":method"].upper() == b"CONNECT":
                headers = [*METHOD_NOT_ALLOWED, *self.config.response_headers("h2")]
                self.connection.send_headers(request.stream_id, headers, end_stream=True)
                if not request.stream_ended:
                    self.connection.reset_stream(request.stream_id, ErrorCodes.NO_ERROR)
            elif lacks_body or not (fields[b":method"].isascii() and fields[b":path"].isascii()):
                self.connection.reset_stream(request.stream_id, ErrorCodes.PROTOCOL_ERROR)
            else:
                return True
        return False

    async def _reset_stream(self, stream_id: int) -> None:
        code = ErrorCodes.PROTOCOL_ERROR
        with suppress(ProtocolError):  # the stream is closed already
            self.connection.reset_stream(stream_id, code)
        await self._handle_events([StreamReset(stream_id=stream_id, error_code=code, remote_reset=False)])

    async def _close(self, error_code: ErrorCodes) -> None:
        logger.warning("HTTP/2 connection of %s closed: %s", self.client, error_code.name)
        with suppress(ProtocolError):
            self.connection.close_connection(error_code)
        await self._disconnect()

    async def _disconnect(self) -> None:
        """Send what h2 has written, and close the socket. What has not been handled yet never will be."""
        self.closed = True
        await self.has_data.set()
        await self._flush()
        await self.send(Closed())


class _Streams(dict[int, Any]):
    """The open streams by id. A closed stream is represented by one that drops its events."""

    def __missing__(self, stream_id: int) -> _ClosedStream:
        return _ClosedStream()


class _ClosedStream:
    async def handle(self, _: Any) -> None:
        pass
