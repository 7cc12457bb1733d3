"""pinnace/memory.py: what the C library says of its pools, in a process of its own. See test_repository as well."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.servers import PROJECT

THREADS_AT_WORK = """
import ctypes, sys, threading
from pinnace.memory import limit_malloc_arenas

if sys.argv[1] == "shared":
    limit_malloc_arenas()
ready = threading.Barrier(4)

def work():
    kept = bytearray(100_000)
    ready.wait()

threads = [threading.Thread(target=work) for _ in range(ready.parties)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w")))
libc.fflush(None)
"""

FREED = """
import os
from pinnace.memory import trim_malloc, limit_malloc_arenas
from bench.server_process import memory_mib

def rss_mib():
    return memory_mib(os.getpid(), "Rss")

limit_malloc_arenas()
blocks = [b"x" * 1_000_000 for _ in range(50)]
del blocks
kept = rss_mib()
trim_malloc()
print(kept - rss_mib())
"""


@pytest.mark.parametrize(("memory", "pools"), [("shared", 1), ("default", 5)])
def test_all_threads_have_one_pool_instead_of_one_each(memory: str, pools: int) -> None:
    command = [sys.executable, "-c", THREADS_AT_WORK, memory]
    metadata = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    assert metadata.count("<heap nr=") == pools


def test_what_is_kept_for_later_can_be_returned_at_once() -> None:
    returned = subprocess.run([sys.executable, "-c", FREED], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert float(returned.stdout) > 30
