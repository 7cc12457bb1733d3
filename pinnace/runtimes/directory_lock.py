"""Directories that several processes may want to make: made by one at a time, and whole or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive_staging_directory(target: Path) -> Iterator[Path]:
    """An empty directory beside `place`, to rename it or its content from; nobody else has one in the meantime.

    Removed at the end, as is what a killed process has left there. Raises OSError.
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
