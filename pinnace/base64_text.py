"""Strict decoding of base64 text."""

from __future__ import annotations

import pybase64

from pinnace.errors import InvalidInput


def from_base64(text: str | bytes) -> bytes:
    """Return the bytes that base64 `text` encodes; whitespace in it is ignored. Raises InvalidInput."""
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        pass
    try:
        packed = "".join(text.split()) if isinstance(text, str) else b"".join(text.split())
        return pybase64.b64decode(packed, validate=True)
    except ValueError:
        raise InvalidInput("not valid base64") from None
