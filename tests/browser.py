"""Headless Chromium that reaches nothing but loopback, and what went wrong on a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-background-networking")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: pages are not looked at")


@contextmanager
def opened(url: str, width_pixels: int = 1280, dark: bool = False) -> Iterator[tuple[Page, list[str]]]:
    """The page, and its troubles so far: requests that failed or were refused, errors and warnings of its scripts."""
    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *OFFLINE])
        page = browser.new_page(
            viewport={"width": width_pixels, "height": 1400}, color_scheme="dark" if dark else "light"
        )
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
        page.on("response", lambda answer: troubles.append(f"{answer.status}: {answer.url}") if not answer.ok else None)
        page.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(url)
        try:
            yield page, troubles
        finally:
            browser.close()
