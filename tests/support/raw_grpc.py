"""gRPC calls written frame by frame, for clients that do what no library does."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, Self, TypeVar

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.support.clients import frame_message

E = TypeVar("E", bound=h2.events.Event)

PSEUDO_HEADERS = ((":method", "POST"), (":scheme", "http"), (":authority", "x"))
Headers = tuple[tuple[str, str], ...]
HEADERS: Headers = (("content-type", "application/grpc"), ("te", "trailers"))


class RawConnection:
    """An HTTP/2 connection to one of the ports. `events` has what the server has sent so far.

    It acknowledges the server's pings, and reads nothing but in `wait_for`.
    """

    def __init__(self, port: int, window_bytes: int = 65535, acknowledges_pings: bool = True) -> None:
        """Connect. `window_bytes` is how much of each response the server may send before the client takes it."""
        self.port = port
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window_bytes})
        self.events: list[h2.events.Event] = []
        self._not_returned: list[h2.events.Event] = []
        self._acknowledges_pings = acknowledges_pings
        self._stream_id = -1
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(self, path: str, message: bytes, headers: Headers = HEADERS, flush: bool = True, end: bool = True) -> int:
        """Send a call with one message, and return its stream. Unless `end`, more messages could follow."""
        self._stream_id += 2
        self.h2.send_headers(self._stream_id, [*PSEUDO_HEADERS, (":path", path), *headers])
        self.h2.send_data(self._stream_id, frame_message(message), end_stream=end)
        if flush:
            self.flush()
        return self._stream_id

    def ping(self) -> None:
        """Send a PING."""
        self.h2.ping(b"12345678")
        self.flush()

    def flush(self) -> None:
        """Send the frames that wait to be sent."""
        self.socket.sendall(self.h2.data_to_send())

    def has_received(self, kind: type[h2.events.Event]) -> bool:
        """Return whether the server has sent an event of this kind."""
        return any(isinstance(event, kind) for event in self.events)

    def wait_for(self, kind: type[E], stream_id: int | None = None) -> E:
        """Return the next event of this kind, of this stream if one is given. Raises AssertionError at the end.

        An event is returned once.
        """
        while True:
            for event in self._not_returned:
                if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                    self._not_returned.remove(event)
                    return event
            data = self.socket.recv(65536)
            assert data, f"the server closed the connection before {kind.__name__}"
            events = self.h2.receive_data(data)
            self.events += events
            self._not_returned += events
            unsent = self.h2.data_to_send()
            if self._acknowledges_pings:
                with suppress(OSError):  # the server has closed: what it sent before is still to be read
                    self.socket.sendall(unsent)

    def wait_for_status(self, stream_id: int) -> grpc.StatusCode:
        """Return the status with which the server ends the call, in trailers or in its only headers."""
        while True:
            event = self.wait_for(h2.events.Event, stream_id)
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                headers: Any = dict(event.headers)
                if number := headers.get("grpc-status"):
                    return next(code for code in grpc.StatusCode if str(code.value[0]) == number)
            assert not isinstance(event, h2.events.StreamEnded | h2.events.StreamReset), "the call has no status"
