"""Pictures that take much CPU time or memory for their size, sent again and again by two clients."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.attacks import Attack
from tests.support.clients import PREDICT, make_v1_request
from tests.support.large_pictures import make_large_picture, make_progressive_jpeg
from tests.support.servers import Server

CLIENTS = 2
ATTACK_SECONDS = 8.0
MIB = 1024 * 1024


def _send_from_two_clients(*make_pictures: Callable[[], bytes]) -> Attack:
    """Return the attack that sends one request with these pictures again and again."""

    def attack(server: Server) -> None:
        body = make_v1_request(*(make() for make in make_pictures)).encode()
        ends_at = time.monotonic() + ATTACK_SECONDS

        def send() -> None:
            with httpx.Client(base_url=server.url, timeout=120) as client:
                while time.monotonic() < ends_at:
                    client.post(PREDICT, content=body)

        with ThreadPoolExecutor(CLIENTS) as clients:
            for sending in [clients.submit(send) for _ in range(CLIENTS)]:
                sending.result()

    return Attack(attack)


ATTACKS = {
    "a JPEG of 49 megapixels and 109,102 scans": _send_from_two_clients(lambda: make_progressive_jpeg(8 * MIB)),
    "a JPEG of as many scans as are allowed": _send_from_two_clients(lambda: make_progressive_jpeg(98_500)),
    "128 copies of a WebP of 49 megapixels": _send_from_two_clients(*[lambda: make_large_picture("WebP")] * 128),
    "a WebP of 49 megapixels": _send_from_two_clients(lambda: make_large_picture("WebP")),
    "three JPEGs of 50 megapixels in a request": _send_from_two_clients(*[lambda: make_large_picture("JPEG")] * 3),
    "a 16-bit PNG of 50 megapixels": _send_from_two_clients(lambda: make_large_picture("PNG, 16-bit grey")),
}
