"""Stored responses: what survives, who may read it, and what goes when there is too much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.store import Store, Stored
from cluster.config.store import StoreConfig


def turn(name: str, previous: str | None = None, text: str = "x", principal: str = "me") -> Stored:
    response = {"id": name, "previous_response_id": previous, "output": [{"id": f"out_{name}", "text": text}]}
    return Stored(principal, response, [{"id": f"in_{name}", "text": text}])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(StoreConfig(folder=str(tmp_path)))
    yield store
    store.close()


async def test_a_response_outlives_the_process_and_others_on_the_machine_see_it(store: Store, tmp_path: Path):
    assert await store.save(turn("a"))
    assert modes(tmp_path) == {0o600}
    other = Store(StoreConfig(folder=str(tmp_path)))
    found = await other.find("a", "me")
    assert found is not None
    assert (found.response["id"], found.input[0]["id"]) == ("a", "in_a")
    await other.save(turn("a", text="newer"))
    again = await store.find("a", "me")
    assert again is not None
    assert again.response["output"][0]["text"] == "newer"
    other.close()


async def test_a_conversation_is_all_turns_in_order_as_far_as_they_are_there(store: Store):
    for name, previous in (("a", None), ("b", "a"), ("c", "b")):
        await store.save(turn(name, previous))
    ids = [item["id"] for item in await store.conversation("c", "me") or []]
    assert ids == ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
    await store.delete("a", "me")
    assert [item["id"] for item in await store.conversation("c", "me") or []] == ids[2:]
    assert await store.conversation("a", "me") is None


async def test_nobody_reads_what_another_principal_has_stored(store: Store):
    await store.save(turn("a"))
    assert await store.find("a", "you") is None
    assert await store.conversation("a", "you") is None
    assert await store.items(["in_a"], "you") == {}
    assert not await store.delete("a", "you")
    assert set(await store.items(["in_a", "out_a", "none"], "me")) == {"in_a", "out_a"}


async def test_what_has_expired_is_not_found_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(StoreConfig(folder=str(tmp_path), keep_s=0.05))
    monkeypatch.setattr("app.store.CLEANING_S", 0.0)
    await store.save(turn("a"))
    await asyncio.sleep(0.06)
    assert await store.find("a", "me") is None
    await store.save(turn("b"))
    assert await count(store, "responses") == 1
    assert await count(store, "items") == 2
    store.close()


async def test_beyond_its_size_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(StoreConfig(folder=str(tmp_path), max_mb=0.1))
    monkeypatch.setattr("app.store.CLEANING_S", 0.0)
    for index in range(5):
        await store.save(turn(str(index), text="x" * 20_000))
    kept = [index for index in range(5) if await store.find(str(index), "me")]
    assert kept == [3, 4]
    store.close()


async def test_many_at_once_from_several_processes_lose_nothing(tmp_path: Path):
    stores = [Store(StoreConfig(folder=str(tmp_path))) for _ in range(3)]
    saved = await asyncio.gather(*(store.save(turn(f"{n}-{i}")) for n, store in enumerate(stores) for i in range(30)))
    assert all(saved)
    assert await count(stores[0], "responses") == 90
    for store in stores:
        store.close()


async def test_the_event_loop_goes_on_while_the_store_works(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.store._find", lambda *_: time.sleep(2.0))
    waiting = asyncio.create_task(store.find("a", "me"))
    started = time.monotonic()
    await asyncio.sleep(0.01)
    assert time.monotonic() - started < 1.5
    await waiting


async def test_a_store_that_cannot_be_opened_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture):
    store = Store(StoreConfig(folder="/proc/none"))
    assert not await store.save(turn("a"))
    assert "is not stored" in caplog.text
    store.close()


async def test_any_text_can_be_stored(store: Store):
    assert await store.save(turn("a", text="\x00 \ud800 ü"))
    found = await store.find("a", "me")
    assert found is not None
    assert found.response["output"][0]["text"] == "\x00 \ud800 ü"


@pytest.mark.parametrize("name", ["\ud800", "\x00", "x" * 1000, ""])
async def test_what_can_be_no_id_is_not_there(store: Store, name: str):
    assert await store.save(Stored("me", {"id": "a", "output": []}, [{"id": name}]))
    assert await store.find(name, "me") is None
    assert await store.conversation(name, "me") is None
    assert await store.items([name], "me") == {}
    assert not await store.delete(name, "me")


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.iterdir()}


async def count(store: Store, table: str) -> Any:
    from sqlalchemy import text

    return await store.run(lambda connection: connection.scalar(text(f"select count(*) from {table}")))


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/db", "nonsense", "env:"])
def test_a_url_with_a_password_stands_in_a_variable(url: str):
    with pytest.raises(ValueError, match="url"):
        StoreConfig(url=url)


def test_a_url_from_a_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STORE", "postgresql://me:secret@host/db")
    assert StoreConfig(url="env:STORE").resolved_url() == "postgresql://me:secret@host/db"
