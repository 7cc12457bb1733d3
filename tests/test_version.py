"""The version in serving/__init__.py is the one that everything else names."""

from __future__ import annotations

import re

from pinnace.version import __version__
from tests.support.servers import PROJECT


def test_the_latest_entry_of_the_changelog_is_of_this_version() -> None:
    latest = re.search(r"^## (\S+?),", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert latest and latest[1] == __version__


def test_kserves_resources_name_the_image_of_this_version() -> None:
    texts = [file.read_text() for file in (PROJECT / "deploy").rglob("*.yaml")]
    versions = {version for text in texts for version in re.findall(r"image: pinnace:([\d.]+)", text)}

    assert versions == {__version__}
