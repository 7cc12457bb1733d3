"""Memory: how much there is, and settings of the C library's allocator (glibc's malloc) and the garbage collector.

By default malloc gives each thread an arena of its own, and little of an arena's memory returns to the system. With
batches of 16 images, int8 AlexNet took 281 MiB under load with the default and takes 241 MiB with one arena for all
threads; fp32 AlexNet took 448 MiB and takes 410 MiB (measured). By default malloc also returns freed memory at the end
of the arena to the kernel at once, which has to clear it page by page for the next image: 1 ms of 10 (measured).
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from pathlib import Path

from pinnace.cgroups import cgroup_directories, read_limit

# mallopt(3): glibc's parameter numbers and our values
M_ARENA_MAX = (-8, 1)
M_MMAP_THRESHOLD = (-3, 32 * 1024 * 1024)
M_TRIM_THRESHOLD = (-1, 64 * 1024 * 1024)

# What the C++ library, ONNX Runtime, CUDA, the C library and the dynamic linker say when memory is refused.
OUT_OF_MEMORY_TEXTS = (
    "bad_alloc",
    "failed to allocate memory",
    "out of memory",
    "cannot allocate memory",
    "failed to map segment from shared object",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, which a library may have made of another, says that there is not enough memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return any(part in text for part in OUT_OF_MEMORY_TEXTS)


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process may use, in bytes: that of the machine, or the limit of a control group.

    The limits are those of the process's cgroup and all its parents, in cgroup v2 (`memory.max`) and v1
    (`memory.limit_in_bytes`). `root` replaces the root of the file system in tests.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in cgroup_directories("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = read_limit(group / name)  # "max" if there is no limit
            limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def default_decode_bytes() -> int:
    """Return the value of --max_decode_bytes if none is set: two fifths of the memory that this process may use.

    In a pod of 1 GiB, AlexNet in fp32 needs 300 MiB, request bodies up to 256 MiB (--max_queue_bytes), and decoding up
    to 410 MiB.
    """
    return available_bytes() * 2 // 5


def limit_malloc_arenas() -> None:
    """Make all threads share one malloc arena that keeps freed memory for reuse.

    Call it before other threads start. No-op without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    for parameter, value in (M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(parameter, value)


def trim_malloc() -> None:
    """Return freed heap memory to the kernel (malloc_trim). Call it after a memory peak. No-op without glibc."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad_bytes: None)(0)


def collect_and_freeze() -> None:
    """Collect garbage once, then freeze the survivors so that later collections skip them.

    Call it after loading or unloading a model. Otherwise full collections would scan everything that the server has
    imported and loaded: under load once per second, and each stops all threads for 20 ms (measured).
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
