"""Control groups: the directories that hold the limits of this process, in version 1 and 2."""

from __future__ import annotations

from pathlib import Path


def cgroup_directories(controller: str, root: Path) -> set[Path]:
    """Return the directories of this process's control group and of all its parents: the smallest limit applies.

    Args:
        controller: For version 1, such as `cpu` or `memory`. Version 2 has one hierarchy for all.
        root: The root of the file system; tests use another one.
    """
    directories: set[Path] = set()
    for line in read_limit(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            mount = mount if mount.exists() else root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be the host's, and only the root of the mount exists.
        group = Path(path.lstrip("/"))
        directories |= {mount, *(mount / parent for parent in [group, *group.parents])}
    return directories


def read_limit(path: Path) -> str:
    """Return the text of a file, without white space around it; empty if the file cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
