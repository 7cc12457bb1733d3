"""pinnace/runtimes/directory_lock.py: directories that end with their process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pinnace.runtimes.directory_lock import temporary_directory

HOLD = """
import pathlib, signal, sys
from pinnace.runtimes.directory_lock import temporary_directory

with temporary_directory("held-", pathlib.Path(sys.argv[1])) as directory:
    (directory / "file").touch()
    print(directory, flush=True)
    signal.pause()
"""


def test_a_directory_is_removed_at_the_end(tmp_path: Path) -> None:
    with temporary_directory("held-", tmp_path) as directory:
        (directory / "file").touch()
        assert list(tmp_path.iterdir()) == [directory]

    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_a_killed_process_is_removed_and_that_of_a_living_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "held-file").touch()
    (tmp_path / "held-link").symlink_to("other")
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            held = Path(process.stdout.readline().strip())
            with temporary_directory("held-", tmp_path):
                assert (held / "file").exists()
        finally:
            process.kill()

    assert held.exists()
    with temporary_directory("held-", tmp_path) as directory:
        assert {path.name for path in tmp_path.iterdir()} == {directory.name, "other", "held-file", "held-link"}
