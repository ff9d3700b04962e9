"""A real Chromium, driven by playwright. Tests that need one are skipped, with the reason, where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The path of a Chromium of this machine. (`.ci/install-tools` installs one on Debian.)"""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium on the PATH; see .ci/install-tools")


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """One browser for many pages."""
    with sync_playwright() as playwright:
        # Without its sandbox, which containers lack: it opens no page but ours.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_of(browser: Browser, url: str, *, dark: bool = False, width: int = 1200, height: int = 800) -> Iterator[Page]:
    """A page in a fresh profile. Errors in its scripts, and loads that its policy forbids, fail the test."""
    context = browser.new_context(
        color_scheme="dark" if dark else "light", viewport={"width": width, "height": height}, locale="en-US"
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    try:
        page.goto(url)
        yield page
        assert not faults, faults
    finally:
        context.close()
