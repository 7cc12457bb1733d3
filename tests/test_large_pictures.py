"""Pictures that take much memory or time: within the limits they are answered, and nobody else is hurt."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.clients import make_v1_request
from tests.support.large_pictures import KINDS, PHONES, make_large_picture
from tests.support.memory_limit import limit_memory
from tests.support.pictures import CAT
from tests.support.servers import PROJECT, Server, run_command, run_server
from tests.support.waiting import wait_for

POD_BYTES = 1024**3  # the limit of deploy/custom.yaml
CLIENTS = 16
MIB = 1024 * 1024
ANSWERED_OR_REFUSED = {200, 413, 503, 504}


MEASURE_PEAK = """
import re, sys
from pathlib import Path
from pinnace.memory import limit_malloc_arenas
from pinnace.models.image import decode
from pinnace.models.image_header import read_header

def peak_bytes():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

limit_malloc_arenas()
data = Path(sys.argv[1]).read_bytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before_bytes = peak_bytes()
decode(data, 10**9)
print(peak_bytes() - before_bytes, read_header(data).decode_bytes)
"""


def send_picture(server: Server, number: int, picture: bytes) -> int:
    """Send a picture, as it is or within JSON by turns. Returns the status."""
    if number % 2:
        return server.predict(make_v1_request(picture)).status_code
    return server.predict(picture, content_type="image/jpeg").status_code


def test_the_largest_pictures_that_phones_make_are_answered_by_default(server: Server) -> None:
    assert [send_picture(server, number, make_large_picture(PHONES)) for number in range(2)] == [200, 200]


def test_a_request_whose_pictures_have_too_many_pixels_together_is_refused(server: Server) -> None:
    answer = server.predict(make_v1_request(*[make_large_picture("WebP")] * 128))

    assert (answer.status_code, answer.json()["error"].partition(" pixels")[0]) == (
        413,
        "the images of the request have 6291072000",
    )


def test_a_picture_that_can_never_be_decoded_in_the_memory_is_refused(model_dir: Path) -> None:
    with run_server(f"--model_dir={model_dir}", f"--max_decode_bytes={400 * MIB}") as server:
        answer = server.predict(make_large_picture("WebP"), content_type="image/webp")

        assert answer.status_code == 413
        assert answer.json()["error"].endswith("more than the 350 MiB that max_decode_bytes allows")
        assert server.predict(make_v1_request(CAT)).status_code == 200


def test_decoding_ends_soon_after_the_deadline_of_a_request(model_dir: Path) -> None:
    flags = ("--request_timeout_seconds=1", "--max_request_pixels=2000000000", "--max_asyncio_workers=1")
    with run_server(f"--model_dir={model_dir}", *flags) as server:
        answer = server.predict(make_v1_request(*[make_large_picture("PNG, palette with transparency")] * 40))
        assert answer.status_code == 504
        # The only thread that decodes is free after the picture that it has just begun. All 40 take 20 s of CPU.
        wait_for(lambda: server.predict(make_v1_request(CAT)).status_code == 200, "an answer", timeout_seconds=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_takes_no_more_memory_than_is_estimated_and_not_much_less(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(make_large_picture(kind))

    done = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, str(file)], cwd=PROJECT, capture_output=True, text=True, check=True
    )

    peak_bytes, estimated_bytes = map(int, done.stdout.split())
    assert 0.6 * estimated_bytes < peak_bytes < 1.05 * estimated_bytes + 16 * MIB


@pytest.mark.slow
def test_a_pod_of_one_gibibyte_survives_each_kind_of_picture_from_sixteen_clients(model_dir: Path) -> None:
    flags = f"--host=127.0.0.1 --http_port=0 --grpc_port=0 --model_dir={shlex.quote(str(model_dir))}"
    with limit_memory(POD_BYTES) as limit:
        command = limit.wrap(f"{shlex.quote(sys.executable)} app.py {flags}")
        with run_command(command) as server, ThreadPoolExecutor(CLIENTS) as clients:
            rounds = {kind: [make_large_picture(kind)] * CLIENTS for kind in KINDS}
            mixed = [*KINDS, *[PHONES] * (CLIENTS - len(KINDS))]
            rounds["all at once"] = [make_large_picture(kind) for kind in mixed]
            for name, pictures in rounds.items():
                statuses = Counter(clients.map(send_picture, itertools.repeat(server), itertools.count(), pictures))
                mib = limit.peak_bytes / 2**20
                sys.stdout.write(f"\n{name}: {dict(statuses)}, the most memory so far {mib:.0f} MiB\n")
                assert set(statuses) <= ANSWERED_OR_REFUSED
                assert server.predict(make_v1_request(CAT)).status_code == 200
                if name == PHONES:
                    assert statuses[200] == CLIENTS
            assert server.stop() == 0
