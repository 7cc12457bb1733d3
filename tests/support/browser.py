"""Headless Chromium that reaches nothing but loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-background-networking")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: pages are not tested")


@contextmanager
def open_page(url: str, width_pixels: int = 1280, dark: bool = False) -> Iterator[tuple[Page, list[str]]]:
    """Open `url` and yield the page and its problems so far.

    Problems are requests that failed or got an error status, and errors and warnings of scripts.
    """
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *OFFLINE])
        page = browser.new_page(
            viewport={"width": width_pixels, "height": 1400}, color_scheme="dark" if dark else "light"
        )
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on(
            "response",
            lambda response: problems.append(f"{response.status}: {response.url}") if not response.ok else None,
        )
        page.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        try:
            yield page, problems
        finally:
            browser.close()
