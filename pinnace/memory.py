"""Memory: one pool of the C library's for all threads, which keeps what they will soon ask for again.

By default each thread has a pool of its own, of which little comes back. With batches of 16 images int8 AlexNet took
281 MiB under load that way, and takes 241 with one; fp32 448 and 410 (measured). What is freed at the end of that one
the kernel would have at once, to clear it page by page for the next picture: one millisecond of ten (measured).
"""

from __future__ import annotations

import ctypes
import gc

POOLS = (-8, 1)  # these numbers are glibc's, see mallopt(3)
LARGEST_KEPT_BYTES = (-3, 32 * 1024 * 1024)
MOST_KEPT_BYTES = (-1, 64 * 1024 * 1024)


def limit_malloc_arenas() -> None:
    """To be called before there are threads. Without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: None)
    for name, value in (POOLS, LARGEST_KEPT_BYTES, MOST_KEPT_BYTES):
        mallopt(name, value)


def trim_malloc() -> None:
    """To the kernel, what is free: after work that needed more than what comes after it. Without effect likewise."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda kept: None)(0)


def collect_and_freeze() -> None:
    """Free what only garbage refers to, and look through what is left no more: for after a load or an unload.

    To look through all that a server has imported and loaded holds up every thread for 20 ms, and was done once a
    second under load (measured).
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
