"""The number of CPUs that this process may use, from its affinity mask and its cgroup quotas."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """Return the number of whole CPUs that this process may use, at least 1. A fraction of a CPU is not counted.

    The quotas are those of the process's cgroup and all its parents, in cgroup v2 (`cpu.max`) and v1
    (`cpu.cfs_quota_us`): the smallest one throttles the process. `root` replaces the root of the file system in tests.
    """
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas(root)])))


def _quotas(root: Path) -> list[float]:
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            mount = mount if mount.exists() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        # Inside a container the path may be the host's, and only the root of the mount exists.
        group = Path(path.lstrip("/"))
        for directory in {mount, *(mount / parent for parent in [group, *group.parents])}:
            quotas += _quota(directory)
    return quotas


def _quota(directory: Path) -> list[float]:
    """Return the number of CPUs that this cgroup may use; the list is empty if there is no quota."""
    quota, _, period = _read(directory / "cpu.max").partition(" ")
    if not period:
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
    try:
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (ValueError, ZeroDivisionError):  # "max", or the files do not exist
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
