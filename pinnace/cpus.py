"""The number of CPUs that this process may use, from its affinity mask and its cgroup quotas."""

from __future__ import annotations

import os
from pathlib import Path

from pinnace.cgroups import cgroup_directories, read_limit


def available_cpus(root: Path = Path("/")) -> int:
    """Return the number of whole CPUs that this process may use, at least 1. A fraction of a CPU is not counted.

    The quotas are those of the process's cgroup and all its parents, in cgroup v2 (`cpu.max`) and v1
    (`cpu.cfs_quota_us`): the smallest one throttles the process. `root` replaces the root of the file system in tests.
    """
    groups = cgroup_directories("cpu", root)
    return max(1, int(min([len(os.sched_getaffinity(0)), *(quota for group in groups for quota in _quota(group))])))


def _quota(directory: Path) -> list[float]:
    """Return the number of CPUs that this cgroup may use; the list is empty if there is no quota."""
    quota, _, period = read_limit(directory / "cpu.max").partition(" ")
    if not period:
        quota, period = read_limit(directory / "cpu.cfs_quota_us"), read_limit(directory / "cpu.cfs_period_us")
    try:
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (ValueError, ZeroDivisionError):  # "max", or the files do not exist
        return []
