"""How many CPUs this process may use: the affinity mask and the cgroup quota, not the host's count."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """Whole CPUs, at least one; half a CPU of quota is not a thread's worth.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`), the process's own group and all above it, since the
    smallest quota on the way up is the one that throttles. `root` stands in for the file system's root.
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
        # Inside a container the path may be the host's, of which only the mount's own root is to be seen.
        group = Path(path.lstrip("/"))
        for directory in {mount, *(mount / parent for parent in [group, *group.parents])}:
            quotas += _quota(directory)
    return quotas


def _quota(directory: Path) -> list[float]:
    """CPUs that this cgroup may use, as a list of none or one."""
    quota, _, period = _read(directory / "cpu.max").partition(" ")
    if not period:
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
    try:
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (ValueError, ZeroDivisionError):  # "max", or no such files
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
