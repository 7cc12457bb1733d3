"""Fixes for HTTP/1.1 in Hypercorn 0.18."""

from __future__ import annotations

import re
from dataclasses import replace
from http.client import responses
from typing import Any

import h11
from hypercorn.events import Closed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import H11SendableEvent

CONNECTION_CLOSE = (b"connection", b"close")
REASONS = {status: reason.encode() for status, reason in responses.items()}
ABSOLUTE_FORM = re.compile(rb"https?://([^/?#]+)", re.IGNORECASE)
ALLOW = (b"allow", b"GET, HEAD, POST")


class PatchedH11Protocol(H11Protocol):
    """One HTTP/1.1 connection.

    It fixes these faults of Hypercorn:

    - A request with both Content-Length and Transfer-Encoding is answered, and so is what a proxy took for its body.
      Here the connection is closed after the response (RFC 9112, section 6.1).
    - The target of a request that a client sends to a proxy, `GET http://host/path`, is taken for a path. Here it is
      split (section 3.2.2).
    - A WebSocket handshake that is refused, as all are here, leaves its connection open and busy for ever; an upgrade
      to h2c gets past proxies that check each request. Here the field Upgrade is ignored, as RFC 9110, section 7.8,
      allows, and the connection of a WebSocket handshake is closed.
    - CONNECT is passed to the application with a target that is no path. Here it gets 405.
    - The status line has no reason phrase, which several clients do not expect.
    """

    _closes_after_response = False

    async def _check_protocol(self, event: h11.Request) -> None:
        fields = dict(event.headers)
        is_websocket = b"websocket" in fields.get(b"upgrade", b"").lower()
        self._closes_after_response = is_websocket or (b"transfer-encoding" in fields and b"content-length" in fields)
        self._request = event
        if b"upgrade" in fields or not event.target.startswith(b"/"):
            self._request = _normalize(event)
        await super()._check_protocol(self._request)

    async def _create_stream(self, request: h11.Request) -> None:
        if request.method.upper() == b"CONNECT":
            await self._refuse_connect()
        else:
            await super()._create_stream(self._request)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send an event of the request that is being answered."""
        if self._closes_after_response and isinstance(event, Response):
            event = replace(event, headers=[*event.headers, CONNECTION_CLOSE])
        await super().stream_send(event)

    async def _refuse_connect(self) -> None:
        headers: list[Any] = [ALLOW, (b"content-length", b"0"), CONNECTION_CLOSE]
        headers += self.config.response_headers("h11")
        await self._send_h11_event(h11.Response(status_code=405, headers=headers))
        await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        if isinstance(event, h11.Response | h11.InformationalResponse) and not event.reason:
            # The event is frozen, and h11 takes 20 µs to make and check another one.
            object.__setattr__(event, "reason", REASONS.get(event.status_code, b""))
        await super()._send_h11_event(event)


def _normalize(request: h11.Request) -> h11.Request:
    """Return the request without its field Upgrade, and with a path instead of an absolute URL as its target."""
    headers = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"upgrade"]
    target = request.target
    if match := ABSOLUTE_FORM.match(target):
        headers = [(name, match[1] if name.lower() == b"host" else value) for name, value in headers]
        target = b"/" + target[match.end() :].removeprefix(b"/")
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)
