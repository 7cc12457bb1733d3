"""pinnace/memory.py: the arenas of malloc, in a process of its own. test_repository tests garbage collection."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.servers import PROJECT

ALLOCATE_IN_THREADS = """
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

FREE_AND_TRIM = """
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


@pytest.mark.parametrize(("memory", "arenas"), [("shared", 1), ("default", 5)])
def test_all_threads_share_one_malloc_arena(memory: str, arenas: int) -> None:
    command = [sys.executable, "-c", ALLOCATE_IN_THREADS, memory]
    malloc_info = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    assert malloc_info.count("<heap nr=") == arenas


def test_trim_malloc_returns_freed_memory_to_the_kernel() -> None:
    returned = subprocess.run(
        [sys.executable, "-c", FREE_AND_TRIM], cwd=PROJECT, capture_output=True, text=True, check=True
    )

    assert float(returned.stdout) > 30
