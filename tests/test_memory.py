"""pinnace/memory.py: the limit of memory, and the arenas of malloc. test_repository tests garbage collection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pinnace.memory import available_bytes, default_decode_bytes
from tests.support.files import write_files
from tests.support.memory_limit import limit_memory
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


@pytest.mark.parametrize(
    ("files", "expected_bytes"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1048576"}, 1_048_576),
        (
            {
                "proc/self/cgroup": "0::/pod/container",
                "sys/fs/cgroup/pod/container/memory.max": "max",
                "sys/fs/cgroup/pod/memory.max": "2097152",
            },
            2_097_152,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n0::/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3145728",
            },
            3_145_728,
        ),
    ],
)
def test_the_smallest_memory_limit_of_the_control_groups_counts(
    files: dict[str, str], expected_bytes: int, tmp_path: Path
) -> None:
    assert available_bytes(write_files(tmp_path, files)) == expected_bytes


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    unlimited = {"proc/self/cgroup": "1:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}

    assert available_bytes(write_files(tmp_path, unlimited)) == machine_bytes
    assert default_decode_bytes() <= machine_bytes * 2 // 5


def test_two_fifths_of_a_containers_memory_are_for_decoding() -> None:
    with limit_memory(100 * 1000 * 4096) as limit:
        command = limit.wrap(f"{sys.executable} -c 'from pinnace.memory import *; print(default_decode_bytes())'")
        printed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    assert int(printed) == 40 * 1000 * 4096
