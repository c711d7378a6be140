"""Takes the picture of the status page in `docs/`: `python tests/ui/picture.py docs/status-page.png`.

Chromium is needed. A pool of fake engines on two logical GPUs, and more clients than it has slots, until a model drains
for another.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.pool import Pool, fake, local_serve, running_pool
from tests.ui.conftest import CHROMIUM

MODELS: dict[str, Any] = {
    "coder-7b": {**fake(load_s=3, tokens_per_s=40), "num_gpus": 1, "target_inflight": 4, "memory_mib": 8600},
    "writer-13b": {**fake(load_s=5, tokens_per_s=30), "num_gpus": 1, "target_inflight": 2, "memory_mib": 15400},
    "chat-3b": {**fake(load_s=2, tokens_per_s=60), "num_gpus": 0.5, "target_inflight": 8, "memory_mib": 3900},
    "vision-4b": {**fake(load_s=2, tokens_per_s=50), "num_gpus": 0.5, "target_inflight": 4, "memory_mib": 5200},
    "embedder": {**fake(load_s=1, tokens_per_s=100), "target_inflight": 16, "memory_mib": 300},
}
CLIENTS = 14
#: So long they ask before the picture is taken, in seconds: the charts have something to show.
BUSY_S = 60.0
SIZE = {"width": 1400, "height": 1500}


def main(target: Path) -> None:
    ended = threading.Event()
    with (
        local_serve(gpus=2) as port,
        running_pool(port, {"models": MODELS, "max_wait_s": {"high": 4, "medium": 8, "low": 20}}) as pool,
    ):
        clients = [threading.Thread(target=ask, args=(pool, seed, ended)) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            take(pool, target)
        finally:
            ended.set()
            for client in clients:
                client.join()


def ask(pool: Pool, seed: int, ended: threading.Event) -> None:
    """One client: a request, a pause, the next one, by its own dice."""
    dice = random.Random(seed)
    with httpx.Client(base_url=pool.url, timeout=120) as http:
        while not ended.wait(dice.expovariate(1.0)):
            body = {
                "model": dice.choice(list(MODELS)),
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": dice.randint(40, 240),
                "priority": dice.choice(["medium", "medium", "low"]),
            }
            http.post("/v1/chat/completions", json=body)


def take(pool: Pool, target: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(f"{pool.url}/ui")
        time.sleep(BUSY_S)
        pool.wait(shows_a_drain, 120)
        # What the ledger has decided is on the page a moment later.
        page.wait_for_timeout(300)
        page.screenshot(path=target)
        browser.close()
    # A page has few colours: a third of the size.
    Image.open(target).convert("RGB").quantize(128).save(target, optimize=True)


def shows_a_drain(ledger: dict[str, Any]) -> bool:
    return ledger["queued"] > 2 and any(row["state"] == "DRAINING" and row["leases"] > 1 for row in ledger["replicas"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
