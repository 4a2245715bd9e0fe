"""A page in Chromium; tests skip with a reason where the browser or Playwright is missing."""

import contextlib
import shutil
import time

import pytest

# For slow machines; costs nothing on others.
PATIENCE = 120  # seconds


@contextlib.contextmanager
def launch_chromium():
    """The browser; the test skips with a reason without it, or without Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=executable, args=["--no-sandbox"], timeout=1000 * PATIENCE
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(path):
    """The page at ``path``, ready; in the end it must have had no problem and asked no network."""
    problems, requests = [], []
    with launch_chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda x: problems.append(x.text) if x.type != "log" else None)
        page.on("pageerror", lambda x: problems.append(str(x)))
        page.on("dialog", lambda x: problems.append(x.message) or x.dismiss())
        page.on("request", lambda x: requests.append(x.url))
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        yield page
    assert problems == []
    assert all(x.startswith(("file:", "data:")) for x in requests)


def wait_until(page, expression, seconds=PATIENCE):
    """As page.wait_for_function, which the Content-Security-Policy of a page may forbid."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(20)
