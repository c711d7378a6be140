"""The status page as a person sees it: a load, a drain and its reason, a queue, an operator's buttons, a chat."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from tests.pool import Pool, kill_ingress
from tests.ui.conftest import PHONE, Opened


class Asked:
    """Requests that run in the background, until their answers are asked for."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._threads: list[threading.Thread] = []
        self.statuses: list[int] = []

    def ask(self, model: str, count: int = 1, **fields: object) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "secret words"}], **fields}

        def send() -> None:
            answer = httpx.post(f"{self._pool.url}/v1/chat/completions", json=body, timeout=60)
            self.statuses.append(answer.status_code)

        for _ in range(count):
            self._threads.append(threading.Thread(target=send))
            self._threads[-1].start()

    def done(self) -> list[int]:
        for thread in self._threads:
            thread.join(60)
        return self.statuses


@pytest.fixture
def asked(pool: Pool) -> Iterator[Asked]:
    asked = Asked(pool)
    yield asked
    asked.done()


@pytest.fixture
def page(opened: Opened) -> Page:
    page = opened()
    expect(page.locator(".connection")).to_have_text("live")
    return page


@pytest.fixture(autouse=True)
def _quiet(pool: Pool) -> Iterator[None]:
    """Every test begins with nothing loaded, and leaves nothing running."""
    for model in ("coder", "writer", "small"):
        assert httpx.post(f"{pool.url}/v1/admin/models/{model}/unload", timeout=60).status_code == 200
    yield
    pool.wait(lambda ledger: ledger["leases"] == 0 and ledger["queued"] == 0)


def row(page: Page, model: str) -> Locator:
    return page.locator(f'.models tr[data-model="{model}"]')


def resident(page: Page, model: str, state: str | None = None) -> Locator:
    return page.locator(f'.replica[data-model="{model}"]' + (f'[data-state="{state}"]' if state else ""))


def test_a_model_loads_on_its_first_request(page: Page, asked: Asked, shots: Path):
    expect(row(page, "coder").locator(".badge")).to_have_text(re.compile("unloaded|asleep"))
    asked.ask("coder")
    expect(resident(page, "coder", "loading").locator("progress")).to_be_visible()
    expect(page.locator('tr[data-waiting="coder"]')).to_contain_text("it loads")
    expect(page.locator('tr[data-waiting="coder"]')).to_contain_text("medium")
    page.screenshot(path=shots / "loading.png")
    expect(resident(page, "coder", "loaded")).to_contain_text("1 of 2 slots")
    assert asked.done() == [200]
    expect(resident(page, "coder", "loaded")).to_contain_text("0 of 2 slots")
    ended = page.locator("tr[data-request]").first
    expect(ended).to_contain_text("coder")
    expect(ended).to_contain_text("200")
    expect(ended.locator("rect.load")).to_have_attribute("width", re.compile("[1-9]"))
    assert "secret words" not in page.content()


def test_a_drain_says_why_and_the_evicted_model_too(page: Page, asked: Asked, shots: Path):
    asked.ask("coder", 2, max_tokens=120)
    expect(resident(page, "coder", "loaded")).to_contain_text("2 of 2 slots")
    asked.ask("writer", priority="high")
    waits = page.locator('tr[data-waiting="writer"]')
    expect(waits).to_contain_text("high")
    expect(waits).to_contain_text(re.compile(r"waits for [12] streams? of coder; its bound (is|was)"))
    drains = resident(page, "coder", "draining")
    expect(drains).to_contain_text(re.compile("[12] streams? to end"))
    expect(drains).to_contain_text(re.compile(r"For writer: request \w+… is of a higher class"))
    page.screenshot(path=shots / "draining.png")
    assert asked.done() == [200] * 3, "no stream was killed"
    expect(resident(page, "writer", "loaded")).to_be_visible()
    expect(row(page, "coder").locator("[data-left]")).to_contain_text("for writer: request ")
    expect(page.locator(".log")).to_contain_text("coder takes nothing new and ends what runs on device 0, because")
    # What was done for the request that waited stands at it.
    page.locator("tr[data-request]", has_text="writer").get_by_role("button").click()
    detail = page.get_by_role("dialog")
    expect(detail).to_contain_text(re.compile("writer gets the room of 1 replica, because", re.IGNORECASE))
    page.keyboard.press("Escape")
    expect(detail).to_have_count(0)


def test_a_queue_forms_and_clears(page: Page, asked: Asked):
    asked.ask("coder", 5)
    waits = page.locator('tr[data-waiting="coder"]')
    expect(waits).to_contain_text("all slots are in use: 2 of 2")
    expect(page.locator('[data-total="waiting"]')).to_have_text("3")
    expect(page.locator('[data-total="slots"]')).to_have_text("2 of 2")
    assert asked.done() == [200] * 5
    expect(waits).to_have_count(0)
    expect(page.get_by_text("Nobody waits.")).to_be_visible()
    assert float(page.locator('[data-total="tokens"]').inner_text()) > 0
    for chart in ("tokens", "running", "ttft", "waits"):
        assert page.locator(f'[data-chart="{chart}"] canvas').count() == 1
    expect(page.get_by_role("img", name=re.compile("Time to the first token: TTFT .* m?s"))).to_be_visible()


def test_an_operator_loads_pins_and_unloads(page: Page, pool: Pool):
    small = row(page, "small")
    small.get_by_role("button", name="Load").click()
    expect(small.locator(".badge")).to_have_text("loaded")
    expect(page.get_by_text("small: load done")).to_be_visible()
    small.get_by_role("button", name="Pin").click()
    expect(small.get_by_role("button", name="Pin")).to_have_attribute("aria-pressed", "true")
    expect(small.locator(".pin")).to_be_visible()
    assert pool.ledger()["models"]["small"]["pinned"]
    small.get_by_role("button", name="Pin").click()
    expect(small.locator(".pin")).to_have_count(0)
    small.get_by_role("button", name="Unload").click()
    expect(small.locator(".badge")).to_have_text(re.compile("unloaded|asleep"))
    expect(small.locator("[data-left]")).to_contain_text("because an operator asked for it")


def test_a_chat_with_a_model_by_keyboard_alone(page: Page):
    row(page, "small").get_by_role("button", name="Try").press("Enter")
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("Hello?")
    page.keyboard.press("Enter")
    answer = page.locator(".turns li.assistant")
    expect(answer).to_contain_text("small:0 small:1")
    expect(answer).to_contain_text("small:11")
    expect(answer).to_contain_text("12 tokens")
    expect(page.locator("tr[data-request]").first).to_contain_text("small")
    page.get_by_role("button", name="Clear").press("Enter")
    expect(answer).to_have_count(0)


def test_a_stopped_chat_gives_its_slot_back(page: Page, pool: Pool):
    page.locator(".chat select").select_option("coder")
    page.get_by_label("Message").fill("Go on")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turns li.assistant")).to_contain_text("coder:0")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".chat .said")).to_have_text("stopped")
    pool.wait(lambda ledger: ledger["leases"] == 0, 5)
    expect(page.locator("tr[data-request]").first).to_contain_text("499")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desk", "phone"])
def test_it_is_readable_on_any_screen_and_by_any_reader(
    opened: Opened, asked: Asked, shots: Path, scheme: str, device: str
):
    page = opened(color_scheme=scheme, **({"viewport": PHONE, "is_mobile": True} if device == "phone" else {}))
    asked.ask("coder", 4, max_tokens=40)
    asked.ask("small", 2, max_tokens=60)
    expect(page.locator('tr[data-waiting="coder"]')).to_contain_text("all slots are in use")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (scheme == "light")
    # What is wider than the screen scrolls within its own box.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.screenshot(path=shots / f"{device}-{scheme}.png", full_page=True)
    asked.done()
    page.locator("tr[data-request]").first.get_by_role("button").click()
    expect(page.get_by_role("dialog")).to_contain_text("Prompts and answers are not kept.")
    page.screenshot(path=shots / f"{device}-{scheme}-detail.png")
    found = Axe().run(page, "dialog")
    assert found.violations_count == 0, found.generate_report()


def test_the_browser_is_led_from_the_root_to_the_page(opened: Opened):
    page = opened("/")
    expect(page).to_have_title("Slotpool")
    assert page.url.endswith("/ui/")


def test_it_comes_back_when_the_ingress_was_restarted(pool: Pool, browser: Browser, asked: Asked):
    # Not by `opened`: while there is no ingress, the browser itself says so on its console.
    page = browser.new_page()
    page.goto(f"{pool.url}/ui")
    expect(page.locator(".connection")).to_have_text("live")
    asked.ask("small")
    assert asked.done() == [200]
    expect(page.locator("tr[data-request]").first).to_contain_text("small")
    known = page.locator("tr[data-request]").count()
    kill_ingress()
    expect(page.locator(".connection")).to_have_text("reconnecting …", timeout=10_000)
    expect(page.locator(".connection")).to_have_text("live", timeout=60_000)
    asked.ask("small")
    deadline = time.monotonic() + 30
    while page.locator("tr[data-request]").count() <= known:
        assert time.monotonic() < deadline, "the request that came afterwards is not seen"
        page.wait_for_timeout(100)
    assert page.evaluate("performance.getEntriesByType('navigation').length") == 1
    page.close()
