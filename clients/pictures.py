"""The pictures that somebody names: files, patterns, URLs, and requests in JSON that have some in them."""

from __future__ import annotations

import base64
import glob
import json
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

MOST_BYTES = 64 * 1024 * 1024
DOWNLOAD_SECONDS = 30

Read = Callable[[], bytes]


def find(names: Iterable[str]) -> list[tuple[str, Read]]:
    """Each picture's name and how to read it. Raises OSError, and ValueError for what is no request."""
    found: list[tuple[str, Read]] = []
    for name in names:
        if name.startswith(("http://", "https://")):
            found.append((name, partial(_download, name)))
        elif name.endswith(".json"):
            found += [(f"{name}[{row}]", partial(bytes, picture)) for row, picture in enumerate(_in_request(name))]
        else:
            matching = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
            found += [(path, Path(path).read_bytes) for path in matching or [name]]
    return found


def _in_request(name: str) -> list[bytes]:
    """Of protocol V1 or V2."""
    try:
        request = json.loads(Path(name).read_text())
        if "instances" in request:
            texts = [instance["image"]["b64"] for instance in request["instances"]]
        else:
            texts = [text for tensor in request["inputs"] for text in tensor["data"]]
        return [base64.b64decode(text) for text in texts]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} is no V1 or V2 request with pictures") from None


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:  # noqa: S310 http and https only
        data: bytes = answer.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise OSError(f"more than {MOST_BYTES} bytes")
    return data
