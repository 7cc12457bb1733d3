"""Pictures named on the command line: files, patterns, URLs, and JSON files with requests that contain pictures."""

from __future__ import annotations

import base64
import glob
import json
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

MAX_DOWNLOAD_BYTES = 64 * 1024 * 1024
DOWNLOAD_TIMEOUT_SECONDS = 30

Read = Callable[[], bytes]


def find_pictures(names: Iterable[str]) -> list[tuple[str, Read]]:
    """Return the name of each picture and a function that reads its encoded bytes.

    Raises OSError if a JSON file cannot be read, and ValueError if it is not a request with pictures. The returned
    functions raise OSError.
    """
    pictures: list[tuple[str, Read]] = []
    for name in names:
        if name.startswith(("http://", "https://")):
            pictures.append((name, partial(_download, name)))
        elif name.endswith(".json"):
            pictures += [(f"{name}[{row}]", partial(bytes, data)) for row, data in enumerate(_read_request(name))]
        else:
            matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
            pictures += [(path, Path(path).read_bytes) for path in matches or [name]]
    return pictures


def _read_request(name: str) -> list[bytes]:
    """Return the pictures in the JSON file `name`, a V1 or V2 request."""
    try:
        request = json.loads(Path(name).read_text())
        if "instances" in request:
            texts = [instance["image"]["b64"] for instance in request["instances"]]
        else:
            texts = [text for tensor in request["inputs"] for text in tensor["data"]]
        return [base64.b64decode(text) for text in texts]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} is not a V1 or V2 request with pictures") from None


def _download(url: str) -> bytes:
    timeout = DOWNLOAD_TIMEOUT_SECONDS
    with urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310 http and https only
        data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise OSError(f"larger than {MAX_DOWNLOAD_BYTES} bytes")
    return data
