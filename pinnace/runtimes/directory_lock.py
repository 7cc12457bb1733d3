"""A lock for directories that several processes create: one creates it at a time, completely or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive_staging_directory(target: Path) -> Iterator[Path]:
    """Yield an empty staging directory next to `target`, holding an exclusive lock.

    The caller renames the directory, or its content, to `target`. Whatever remains in it is removed at the end, and so
    is what a killed process left behind. Raises OSError.
    """
    staging = target.with_suffix(".part")
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
