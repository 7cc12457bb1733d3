"""Clients that send requests and do not read the responses."""

from __future__ import annotations

import json
import socket

import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.support.clients import PREDICT
from tests.support.servers import Server

SMALL_BUFFER_BYTES = 4096
FRAME_BYTES = 16384


def make_echo_request(size_bytes: int) -> bytes:
    """Return a V1 request for the predictor Echo, whose response is as long."""
    return json.dumps({"instances": ["x" * size_bytes]}).encode()


def make_http1_request(body: bytes) -> bytes:
    """Return a prediction request over HTTP/1.1."""
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (PREDICT.encode(), len(body), body)


def connect_with_small_buffer(server: Server) -> socket.socket:
    """Open a connection to the HTTP port whose client has room for little that it does not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.http_port))
    return connection


class Http2Client:
    """An HTTP/2 connection whose streams begin with this window for responses."""

    def __init__(self, server: Server, window_bytes: int) -> None:
        self._socket = server.connect()
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        windows = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window_bytes}
        self._connection.local_settings = h2.settings.Settings(client=True, initial_values=windows)
        self._connection.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.send()

    def __enter__(self) -> Http2Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self) -> None:
        """Send what the state machine has to send."""
        self._socket.sendall(self._connection.data_to_send())

    def request(self, body: bytes, path: str = PREDICT, **headers: str) -> int:
        """Send a request and return the number of its stream."""
        stream_id = self._connection.get_next_available_stream_id()
        pseudo = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "x")]
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        self._connection.send_headers(stream_id, [*pseudo, *named])
        while True:
            size_bytes = min(self._connection.local_flow_control_window(stream_id), FRAME_BYTES, len(body))
            self._connection.send_data(stream_id, body[:size_bytes], end_stream=size_bytes == len(body))
            self.send()
            body = body[size_bytes:]
            if not body:
                return stream_id
            while not self._connection.local_flow_control_window(stream_id):
                self.receive()

    def open_window(self, stream_id: int) -> None:
        """Let the server send on a stream."""
        self._connection.increment_flow_control_window(65535, stream_id)
        self.send()

    def receive(self) -> bool:
        """Read once, and add to `events`. Return False if the server has closed the connection."""
        try:
            data = self._socket.recv(65536)
        except ConnectionResetError:
            return False
        self.events += self._connection.receive_data(data)
        return bool(data)

    def wait_for(self, kind: type[h2.events.Event], *stream_ids: int) -> None:
        """Read until each of the streams has had an event of this kind."""
        while set(stream_ids) - {getattr(event, "stream_id", 0) for event in self.events if isinstance(event, kind)}:
            assert self.receive(), f"closed before {kind.__name__} on {stream_ids}"
