"""REST client; it needs no package but Python's own: `python3 -m clients.rest_client photo.jpg`."""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from clients.cli import Classes, Classify, ServerError, authorization, run

MAX_ATTEMPTS = 4  # a busy server answers 503 with Retry-After


@contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[Classify]:
    """Yield the function that classifies a picture over REST V1. Raises OSError."""
    context = arguments.ssl_context
    scheme = "https" if context else "http"
    url = f"{scheme}://{arguments.address}/v1/models/{quote(arguments.model_name)}:predict"
    optional = {"Authorization": authorization(arguments), "Host": arguments.authority}
    headers = {"Content-Type": "application/json", **{name: value for name, value in optional.items() if value}}

    def send(body: bytes) -> bytes:
        request = urllib.request.Request(url, body, headers)  # noqa: S310 http or https only
        with urllib.request.urlopen(request, timeout=arguments.timeout_seconds, context=context) as response:  # noqa: S310
            return bytes(response.read())

    def classify(picture: bytes) -> Classes:
        instance = {"image": {"b64": base64.b64encode(picture).decode()}}
        body = json.dumps({"signature_name": "classification", "instances": [instance]}).encode()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                (row,) = json.loads(send(body))["predictions"]
                return [(entry["label"], entry["probability"]) for entry in row]
            except urllib.error.HTTPError as error:
                with error:
                    wait_seconds = error.headers.get("retry-after", "")
                    if error.code != 503 or not wait_seconds.isdigit() or attempt == MAX_ATTEMPTS:
                        raise ServerError(
                            f"{arguments.address} answered {error.code}: {_error_text(error.read())}"
                        ) from None
                time.sleep(int(wait_seconds))
            except urllib.error.URLError as error:
                raise ServerError(f"{arguments.address} cannot be reached, see --address: {error.reason}") from None
            except http.client.HTTPException:
                raise ServerError(f"{arguments.address} does not speak HTTP: see --address") from None
            except (KeyError, TypeError, ValueError):
                raise ServerError(f"{arguments.address} did not answer with classes: see --address") from None
        raise AssertionError  # the last attempt returns or raises

    yield classify


def _error_text(body: bytes) -> str:
    """Return the server's error text, or the beginning of the body if another kind of server answered."""
    try:
        return str(json.loads(body)["error"])
    except (KeyError, TypeError, ValueError):
        return body[:100].decode(errors="replace")


if __name__ == "__main__":
    sys.exit(run("rest_client", 8080, connect))
