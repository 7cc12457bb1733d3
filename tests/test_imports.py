"""Imports: what a module loads, and what it must leave alone."""

from __future__ import annotations

import subprocess
import sys

from tests.support.servers import PROJECT


def test_the_http_side_does_not_load_pillow() -> None:
    script = "import sys, pinnace.http.app; print([name for name in sys.modules if name.partition('.')[0] == 'PIL'])"

    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
