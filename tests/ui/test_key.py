"""The status page of a pool with keys: it asks for one, keeps it for the tab, and shows it nowhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.pool import Pool, fake, running_pool


def digest(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


KEYED = {
    "models": {"small": fake(tokens=3)},
    "api_keys": [{"name": "bulk", "key": digest("user")}],
    "admin_keys": [{"name": "boss", "key": digest("operator")}],
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, KEYED) as pool:
        yield pool


def test_the_page_asks_for_the_admin_key(browser: Browser, pool: Pool):
    # Not by `opened`: the browser itself says on its console that it was refused.
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{pool.url}/ui")
    key = page.get_by_label("admin key")
    expect(key).to_be_focused()
    expect(page.locator(".connection")).to_have_text("a key is needed")
    expect(page.locator(".ask-key")).to_contain_text("a valid admin key is required")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    key.fill("user")
    key.press("Enter")
    expect(page.locator(".ask-key")).to_contain_text("this route needs an admin key")
    key.fill("operator")
    key.press("Enter")
    expect(page.locator(".connection")).to_have_text("live")
    expect(page.locator(".ask-key")).to_have_count(0)
    page.get_by_label("Message").fill("Hi")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turns li.assistant")).to_contain_text("small:2")
    expect(page.locator("tr[data-request]").first).to_contain_text("boss")
    page.reload()
    expect(page.locator(".connection")).to_have_text("live")
    assert "operator" not in page.url
    assert "operator" not in page.content()
    context.close()


def test_another_tab_does_not_know_it(browser: Browser, pool: Pool):
    page = browser.new_page()
    page.goto(f"{pool.url}/ui")
    expect(page.locator(".connection")).to_have_text("a key is needed")
    page.close()
