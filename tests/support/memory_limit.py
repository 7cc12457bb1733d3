"""A memory limit as Kubernetes sets it: a control group, of version 1 or 2, for the processes of a test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """A control group with a limit."""

    directory: Path

    def wrap(self, command: str) -> list[str]:
        """Return a command that enters the group and then becomes the given shell command."""
        return ["sh", "-c", f"echo $$ > {self.directory}/cgroup.procs && exec {command}"]

    @property
    def peak_bytes(self) -> int:
        """Return the most memory that the group has used, its share of the page cache included."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if (file := self.directory / name).exists():
                return int(file.read_text())
        return 0


@contextmanager
def limit_memory(limit_bytes: int) -> Iterator[MemoryLimit]:
    """Yield a new control group. Skips the test where none can be made. Its processes must have ended at the end."""
    version_1 = MOUNT / "memory"
    parent, name = (version_1, "memory.limit_in_bytes") if version_1.exists() else (MOUNT, "memory.max")
    directory = parent / f"test-{uuid.uuid4().hex}"
    try:
        directory.mkdir()
        (directory / name).write_text(str(limit_bytes))
        swap = directory / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
    except OSError as error:
        if directory.exists():
            directory.rmdir()
        pytest.skip(f"no control group with a memory limit can be made: {error}")
    try:
        yield MemoryLimit(directory)
    finally:
        os.rmdir(directory)
