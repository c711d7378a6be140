"""Two models on one device whose replicas stay while their engines come and go, over real Serve."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import effects, reservation
from cluster.ledger.specs import NodeSpec
from cluster.reservation import Reservation
from tests.pool import Pool, fake, loaded, running_pool
from tests.unit.raylet import lives

BOTH = ("one", "two")
MODELS = {
    **{
        name: {**fake(tokens=30, tokens_per_s=100, load_s=0.05), "num_gpus": 1, "target_inflight": 2, "sleep_level": 2}
        for name in BOTH
    },
    "dozes": {**fake(tokens=30, load_s=2.0, wake_s=0.05), "num_gpus": 1, "sleep_level": 1},
    "wakes_badly": {**fake(tokens=30, load_s=0.1, fault="wake_fails"), "num_gpus": 1, "sleep_level": 1},
}
TITLE = b"ray::ServeReplica:slotpool:"


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    with running_pool(port, {"models": MODELS, "max_asleep": 3}) as pool:
        yield pool
        pool.check()


def say(pool: Pool, model: str, tokens: int = 2) -> str:
    messages: Any = [{"role": "user", "content": "x"}]
    stream = pool.openai().chat.completions.create(model=model, messages=messages, max_tokens=tokens, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == "".join(f"{model}:{index} " for index in range(tokens))
    return text


def supervisors(models: tuple[str, ...] = BOTH) -> dict[str, int]:
    """The process of the replica of each of these models."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().partition(b"\0")[0]
        except OSError:
            continue
        if title.startswith(TITLE) and b":ingress" not in title:
            found[title.removeprefix(TITLE).decode().strip()] = int(folder.name)
    return {model: pid for model, pid in found.items() if model in models}


def engine(pool: Pool, model: str) -> int | None:
    """The process of a model's engine, by the ledger's book; None while none is loaded."""
    rows = loaded(pool.ledger(), model)
    return rows[0]["pid"] if rows else None


def test_a_models_process_is_there_before_anybody_asks_for_it(pool: Pool):
    say(pool, "one")
    pool.wait(lambda ledger: any(row["model"] == "two" and row["replica"] for row in ledger["replicas"]))
    # Ray names a process after what it is just doing.
    pool.wait(lambda _: set(supervisors()) == set(BOTH))
    kept = supervisors()
    assert statuses(pool)["two"] == "sleeping"
    say(pool, "two")
    assert supervisors() == kept


def test_a_swap_keeps_the_replicas_and_ends_the_engine(pool: Pool):
    for model in ("one", "two"):
        say(pool, model)
    kept = supervisors()
    assert set(kept) == {"one", "two"}
    seen = set()
    for swap in range(10):
        model, other = (("one", "two"), ("two", "one"))[swap % 2]
        say(pool, model)
        pid = engine(pool, model)
        assert pid is not None
        assert lives(pid)
        assert engine(pool, other) is None
        assert pid not in seen
        seen.add(pid)
        assert sum(map(lives, seen)) == 1
    assert supervisors() == kept
    assert sum(row["model"] in BOTH for row in pool.ledger()["replicas"]) == 2


def statuses(pool: Pool) -> dict[str, str]:
    with pool.http() as http:
        return {row["id"]: row["status"] for row in http.get("/v1/models").json()["data"]}


def environment(pool: Pool, model: str) -> dict[str, Any]:
    """The engine's process and its devices, as it tells them."""
    with pool.http() as http:
        return http.get("/fake/environment", params={"model": model}).json()  # type: ignore[no-any-return]


def test_an_engine_sleeps_and_wakes_in_its_process_on_the_device_that_it_had(pool: Pool):
    say(pool, "dozes")
    before = engine(pool, "dozes")
    assert before is not None
    for other in BOTH:
        say(pool, other)
        assert lives(before)
        assert (statuses(pool)["dozes"], statuses(pool)[other]) == ("sleeping", "loaded")
        row = next(row for row in pool.ledger()["replicas"] if row["model"] == "dozes")
        assert (row["state"], row["devices"]) == ("ASLEEP", [])
        asked_at = time.monotonic()
        say(pool, "dozes")
        assert time.monotonic() - asked_at < 2.0, "to load takes two seconds"
        assert engine(pool, "dozes") == before
        assert environment(pool, "dozes") == {"pid": before, "CUDA_VISIBLE_DEVICES": "0"}


def test_an_engine_that_does_not_wake_is_loaded_and_its_client_waits(pool: Pool):
    say(pool, "wakes_badly")
    before = engine(pool, "wakes_badly")
    say(pool, "one")
    assert before is not None
    assert lives(before)
    say(pool, "wakes_badly")
    assert not lives(before)
    assert engine(pool, "wakes_badly") not in (None, before)


def test_a_death_of_the_ledger_lets_an_engine_sleep(pool: Pool):
    say(pool, "dozes")
    before = engine(pool, "dozes")
    say(pool, "two")
    ray.kill(effects.find_ledger(), no_restart=False)
    say(pool, "two")
    say(pool, "dozes")
    assert engine(pool, "dozes") == before


def test_no_stream_is_cut_by_swaps(pool: Pool):
    def client(model: str) -> None:
        for _ in range(3):
            say(pool, model, tokens=60)
            done.append(model)

    done: list[str] = []
    kept = supervisors()
    clients = [threading.Thread(target=client, args=(model,)) for model in ("one", "two", "one", "two")]
    for each in clients:
        each.start()
    for each in clients:
        each.join(120)
    assert sorted(done) == ["one"] * 6 + ["two"] * 6
    assert supervisors() == kept


def test_a_sleeper_that_is_killed_is_replaced(pool: Pool):
    say(pool, "one")
    say(pool, "two")
    before = supervisors()
    os.kill(before["one"], signal.SIGKILL)
    say(pool, "one")
    say(pool, "two")
    after = supervisors()
    assert after["two"] == before["two"]
    assert after["one"] != before["one"]


def test_a_death_of_the_ledger_costs_no_stream_and_no_replica(pool: Pool):
    say(pool, "one")
    say(pool, "two")
    kept = supervisors()
    texts: list[str] = []
    streams = [threading.Thread(target=lambda: texts.append(say(pool, "two", tokens=200))) for _ in range(2)]
    for each in streams:
        each.start()
    pool.wait(lambda ledger: ledger["leases"] == 2)
    time.sleep(0.3)
    ray.kill(effects.find_ledger(), no_restart=False)
    say(pool, "one")
    for each in streams:
        each.join(60)
    assert len(texts) == 2
    say(pool, "two")
    assert supervisors() == kept


def test_other_jobs_get_none_of_the_devices(pool: Pool):
    @ray.remote(num_gpus=0.02, num_cpus=0)
    def stranger() -> None:
        pass

    assert any(effects.reservations().values())
    answer = stranger.remote()
    assert ray.wait([answer], timeout=2)[0] == []
    ray.cancel(answer)


async def test_a_reservation_is_found_again_and_given_back(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    nodes = {node["NodeID"]: NodeSpec(node["NodeID"], gpus=1) for node in ray.nodes()}
    before = effects.reservations()
    later = Reservation()
    assert await later.hold(nodes, is_wanted=True, is_used=True) == nodes
    assert effects.reservations() == before == dict.fromkeys(nodes, True)
    monkeypatch.setattr(reservation, "UNUSED_S", 0.0)
    await later.hold(nodes, is_wanted=True, is_used=False)
    assert effects.reservations() == {}
    await later.hold(nodes, is_wanted=True, is_used=True)
