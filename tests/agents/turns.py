"""Each agent and client library completes a turn against a pool: warm, while its model loads, and after one refusal.

`make test-agents` installs the clients and runs this file; CI does not, for they are two gigabytes. The clients run
beside each other, each against a model of its own; what came of every turn is printed at the end.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.agents.clients import CLIENTS, TOKENS, Client, Ran, run
from tests.pool import Pool, fake, running_pool
from tests.silence import FAMILIES, PATIENCE_S, longest_silence

SCENES = ("warm", "loading", "refused")
LOAD_S = 40.0
#: How many clients run at a time; each takes a processor for some seconds when it starts.
AT_A_TIME = 4
TURN_S = 150.0
#: The models of each scene. Refusals are counted for the whole pool, so there is one at a time.
MODELS = {
    "warm": [f"warm-{index}" for index in range(AT_A_TIME)],
    "loading": [f"slow-{index}" for index in range(AT_A_TIME)],
    "refused": ["manual"],
}


@dataclass(frozen=True)
class Turn:
    """What came of a client's turn with a model, and how many requests of it ended with which status."""

    model: str
    ran: Ran
    took_s: float
    statuses: Counter[int]


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    answers = {"tokens": TOKENS, "tokens_per_s": 50}
    models: dict[str, Any] = {"silent": fake(load_s=LOAD_S, **answers)}
    models |= {model: {**fake(**answers), "min_replicas": 1} for model in MODELS["warm"]}
    models |= {model: fake(load_s=LOAD_S, **answers) for model in MODELS["loading"]}
    models |= {model: {**fake(**answers), "activation": "manual"} for model in MODELS["refused"]}
    with running_pool(port, {"models": models, "max_asleep": len(models)}) as pool:
        yield pool
        pool.check()


def statuses_of(pool: Pool, model: str) -> Counter[int]:
    """How many requests of a model have ended with which status so far."""
    found: Counter[int] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{pool.url}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name == "slotpool_requests_total" and sample.labels["model"] == model:
                found[int(sample.labels["status"])] += int(sample.value)
    return found


class Stage:
    """Where the turns are played, each with a model that no other client has at that time."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self._free: dict[str, queue.Queue[str]] = {scene: queue.Queue() for scene in SCENES}
        for scene, models in MODELS.items():
            for model in models:
                self._free[scene].put(model)

    def play(self, client: Client, scene: str) -> Turn:
        """One turn of a client in a scene."""
        model = self._free[scene].get()
        try:
            if scene == "loading":
                self._order(model, "unload")
            if scene == "refused":
                return self._refused_turn(client, model)
            return self._turn(client, scene, model)
        finally:
            self._free[scene].put(model)

    def _refused_turn(self, client: Client, model: str) -> Turn:
        """A turn with a model that its operator loads when the client has been refused."""
        # A process is there afterwards, so that the load comes between the refusal and the second try.
        self._order(model, "load")
        self._order(model, "unload")
        is_over = threading.Event()
        operator = threading.Thread(target=self._load_after_a_refusal, args=(model, is_over))
        operator.start()
        try:
            return self._turn(client, "refused", model)
        finally:
            is_over.set()
            operator.join()

    def _turn(self, client: Client, scene: str, model: str) -> Turn:
        home = self._folder / f"{client.name}-{scene}"
        home.mkdir()
        before, started = statuses_of(self._pool, model), time.monotonic()
        ran = run(client, self._pool.url, model, home, TURN_S)
        took_s, after = time.monotonic() - started, statuses_of(self._pool, model)
        return Turn(model, ran, took_s, after - before)

    def _load_after_a_refusal(self, model: str, is_over: threading.Event) -> None:
        before = self._pool.ledger()["rejected"]
        while not is_over.wait(0.02):
            if self._pool.ledger()["rejected"] > before:
                self._order(model, "load")
                return

    def _order(self, model: str, order: str) -> None:
        with self._pool.http() as http:
            http.post(f"/v1/admin/models/{model}/{order}").raise_for_status()


@pytest.fixture(scope="module")
def turns(
    pool: Pool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Turn]]]:
    """The turns of all tests that were chosen: they begin at once, a few at a time."""
    stage = Stage(pool, tmp_path_factory.mktemp("homes"))
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    threads = ThreadPoolExecutor(AT_A_TIME)
    played = {
        (each["client"].name, each["scene"]): threads.submit(stage.play, each["client"], each["scene"])
        for each in asked
        if "scene" in each
    }
    try:
        yield played
    finally:
        threads.shutdown(cancel_futures=True)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{table(played)}")


def table(played: dict[tuple[str, str], Future[Turn]]) -> str:
    """What came of the turns, as Markdown: seconds, and the statuses of the requests that were made."""
    rows = ["", f"| client | version | {' | '.join(SCENES)} |", "|---" * (2 + len(SCENES)) + "|"]
    for client in CLIENTS:
        cells = [_cell(played.get((client.name, scene))) for scene in SCENES]
        if any(cells):
            rows.append(f"| {client.name} | {client.version} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(turn: Future[Turn] | None) -> str:
    if turn is None or not turn.done() or turn.cancelled() or turn.exception() is not None:
        return ""
    done = turn.result()
    requests = ", ".join(f"{count} × {status}" for status, count in sorted(done.statuses.items()))
    return f"{'' if is_whole(done) else 'FAILED '}{done.took_s:.0f} s ({requests})"


def is_whole(turn: Turn) -> bool:
    """Whether the client says that all went well, and has shown every word of the answer."""
    return turn.ran.status == 0 and all(f"{turn.model}:{index}" in turn.ran.said for index in range(TOKENS))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_completes_its_turn(turns: dict[tuple[str, str], Future[Turn]], client: Client, scene: str):
    turn = turns[client.name, scene].result()
    assert is_whole(turn), turn.ran
    unwelcome = {status for status in turn.statuses if status not in (200, 499)}
    assert unwelcome == ({503} if scene == "refused" else set()), turn
    if scene == "loading":
        assert turn.took_s >= LOAD_S


async def test_a_stream_whose_model_loads_for_40_s_is_never_silent_for_long(pool: Pool):
    """In each family it completes, and exactly one request runs."""
    started = time.monotonic()
    told = await asyncio.gather(*(longest_silence(pool.url, "silent", name) for name in FAMILIES))
    assert time.monotonic() - started >= LOAD_S
    for family, (longest, text) in zip(FAMILIES, told, strict=True):
        assert longest < PATIENCE_S, family
        assert f"silent:{TOKENS - 1}" in text, family
    assert statuses_of(pool, "silent") == {200: len(FAMILIES)}
