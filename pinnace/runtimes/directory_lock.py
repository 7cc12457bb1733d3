"""Locks for directories: one that several processes create, and one that ends with the process that made it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def temporary_directory(prefix: str, parent: Path) -> Iterator[Path]:
    """Yield a new directory in `parent`, and remove it at the end. First remove those that killed processes have left.

    A process holds a lock on its directory, which the kernel releases when it ends, however it ends. Raises OSError.
    """
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # another user's, or no directory
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError if its process lives
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
    directory, descriptor = _make_locked_directory(prefix, parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _make_locked_directory(prefix: str, parent: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # before it was locked, another process took it for one that was left
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # NFS cannot lock directories: no process can then lock and remove it either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if directory.exists():
                return directory, descriptor
            os.close(descriptor)
