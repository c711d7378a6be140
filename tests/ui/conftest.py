"""A real headless Chromium, and a pool with fake engines that are slow enough to be watched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.pool import Pool, fake, running_pool

#: The system's own browser; nothing is downloaded.
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
#: For so long a page may take to show what is expected, in ms: a process may have to be started for it.
expect.set_options(timeout=20_000)
PHONE = {"width": 390, "height": 844}

MODELS = {
    "coder": {**fake(load_s=1.5, tokens_per_s=25, tokens=50, ttft_s=0.2), "num_gpus": 1, "target_inflight": 2},
    "writer": {**fake(load_s=1.0, tokens_per_s=50, tokens=20), "num_gpus": 1, "target_inflight": 4},
    "small": {**fake(load_s=0.3, tokens_per_s=50, tokens=12), "target_inflight": 8},
}
#: So short that the page shows a bound while a test waits for it.
BOUNDS = {"high": 3, "medium": 6, "low": 20}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "max_wait_s": BOUNDS}) as pool:
        yield pool
        pool.check()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium to open the page with (Debian: apt-get install chromium)")
    # Its loop is a running one in this thread until it ends: no asynchronous test may be among those of the module.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, pool: Pool) -> Iterator[Opened]:
    """Opens the page. At the end nothing may have gone wrong in any that was opened: no error, nothing refused."""
    wrong: list[str] = []
    contexts = []

    def go(path: str = "/ui", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(pool.url) else wrong.append(asked.url))
        page.goto(f"{pool.url}{path}")
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where the pictures of a run are kept, for people to look at."""
    folder = Path(os.environ.get("SLOTPOOL_SHOTS") or ".pytest_cache/ui-shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
