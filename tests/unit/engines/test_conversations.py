"""Conversations that outlive a llama.cpp engine, with real weights: what is saved, restored, and said afterwards."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from deployments.engines.llama_cpp import conversations as conversations_module
from deployments.engines.llama_cpp.conversations import fingerprint
from deployments.engines.llama_cpp.engine import LlamaCppEngine
from deployments.engines.protocol import Call, Remembering, Report, Saving
from deployments.kv_store.entry import SUFFIX
from deployments.kv_store.places import Places
from tests.unit.engines.drive import CHAT, ask, body

WORDS = ["sea", "wind", "stone", "river", "light", "house", "green", "small", "old", "bread", "road", "bird", "cloud"]
#: One thread, since two wait for each other wherever the machine has other work.
CONTEXT, SLOTS, THREADS = 2048, 3, 1


def story(seed: int, words: int) -> str:
    """A text of that many words, each of which is about one token."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


@dataclass
class Answered:
    text: str
    report: Report
    usage: dict[str, Any]

    @property
    def cached(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


async def say(engine: LlamaCppEngine, messages: list[dict[str, str]], tokens: int = 24) -> Answered:
    """A greedy answer, and what it took."""
    reply = await engine.call(Call(CHAT, {"messages": messages, "temperature": 0, "max_tokens": tokens}, "r"))
    async with aclosing(reply.chunks) as chunks:
        answer = json.loads(b"".join([chunk async for chunk in chunks]))
    return Answered(answer["choices"][0]["message"]["content"], reply.report, answer["usage"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@asynccontextmanager
async def loaded(weights: str, where: Places | None, **options: Any) -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(
        weights, model_id="smollm2", **{"slots": SLOTS, "n_ctx": CONTEXT, "n_threads": THREADS, **options}
    )
    assert isinstance(engine, Remembering)
    if where is not None:
        engine.remember_in(where.as_dict())
    await engine.load(lambda _: None)
    try:
        yield engine
    finally:
        await engine.unload()


@dataclass
class Talk:
    """A conversation of two turns, as an engine that was never unloaded had it, and the first of them saved."""

    folder: Path
    first: list[dict[str, str]]
    second: list[dict[str, str]]
    said: Answered
    cold: Report
    saving: Saving

    @property
    def places(self) -> Places:
        return Places(str(self.folder), 1 << 30)

    def entries(self) -> list[Path]:
        return list(self.folder.glob(f"*{SUFFIX}"))


@pytest.fixture(scope="module")
async def long_talk(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    """One of 1,500 tokens."""
    return await begun(smollm2, tmp_path_factory.mktemp("store"), 1450)


@pytest.fixture(scope="module")
async def short_talk(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    return await begun(smollm2, tmp_path_factory.mktemp("store"), 300)


@pytest.fixture
def talk(short_talk: Talk, tmp_path: Path) -> Talk:
    """The short one, saved in a folder of the test's own."""
    for path in short_talk.entries():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return replace(short_talk, folder=tmp_path)


async def begun(smollm2: str, folder: Path, words: int) -> Talk:
    first = [user(f"Remember these words: {story(1, words)}. What is the first one?")]
    async with loaded(smollm2, Places(str(folder), 1 << 30)) as engine:
        answer = await say(engine, first)
        assert engine._loop is not None
        assert engine._conversations is not None
        saving = engine._conversations.save(engine._loop.slots)
        second = [*first, {"role": "assistant", "content": answer.text}, user("And the second one?")]
        said = await say(engine, second)
    assert (answer.report.restored_tokens, said.report.restored_tokens) == (0, None)
    return Talk(folder, first, second, said, answer.report, saving)


async def test_a_conversation_goes_on_after_a_swap(long_talk: Talk, smollm2: str):
    assert long_talk.saving.sequences == 1
    assert long_talk.saving.bytes > 20 << 20
    async with loaded(smollm2, long_talk.places) as engine:
        again = await say(engine, long_talk.second)
        assert again.text == long_talk.said.text
        assert again.cached == long_talk.said.cached == again.report.restored_tokens
        assert again.cached >= 0.95 * again.usage["prompt_tokens"]
        assert again.report.ttft_ms is not None
        assert long_talk.cold.ttft_ms is not None
        assert again.report.ttft_ms <= 0.25 * long_talk.cold.ttft_ms
        third = await say(engine, long_talk.second)
        assert (third.text, third.report.restored_tokens) == (again.text, None), "a slot has it now"
        assert (await engine.save()).sequences == 1, "it has grown"
    assert len(long_talk.entries()) == 1, "and takes the place of what it has grown from"


async def test_what_is_restored_is_cut_to_what_the_prompt_has_of_it(talk: Talk, smollm2: str):
    other = [user(talk.first[0]["content"].replace("What is the first one?", "Which one is the last of them?"))]
    async with loaded(smollm2, None) as engine:
        plain = await say(engine, other)
    async with loaded(smollm2, talk.places) as engine:
        restored = await say(engine, other)
    assert restored.text == plain.text
    assert 0.95 * restored.usage["prompt_tokens"] < restored.cached < restored.usage["prompt_tokens"] - 5


@pytest.mark.parametrize("damage", ["cut", "garbage", "state"])
async def test_what_is_broken_is_evaluated_again(talk: Talk, smollm2: str, damage: str):
    (entry,) = talk.entries()
    data = bytearray(entry.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "garbage":
        data = bytearray(random.Random(1).randbytes(len(data)))
    else:
        data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    async with loaded(smollm2, talk.places) as engine:
        again = await say(engine, talk.second)
        assert (again.text, again.report.restored_tokens) == (talk.said.text, 0)
        assert again.cached == 0
        assert (await engine.save()).sequences == 1
    async with loaded(smollm2, talk.places) as engine:
        assert (await say(engine, talk.second)).report.restored_tokens


async def test_an_engine_of_another_shape_does_not_use_it(talk: Talk, smollm2: str):
    for options in ({"slots": SLOTS + 1}, {"n_ctx": CONTEXT + 256}, {"type_k": "q8_0", "flash_attn": "on"}):
        async with loaded(smollm2, talk.places, **options) as engine:
            again = await say(engine, talk.second, tokens=1)
            assert (again.report.restored_tokens, again.cached) == (0, 0), options


async def test_the_fingerprint_is_the_files_and_the_shapes(smollm2: str, tmp_path: Path):
    copy = tmp_path / "other.gguf"
    shutil.copyfile(smollm2, copy)
    async with loaded(smollm2, None) as engine, loaded(str(copy), None) as other:
        one = fingerprint(engine._runtime, engine._options)  # type: ignore[arg-type]
        assert fingerprint(engine._runtime, engine._options) == one  # type: ignore[arg-type]
        assert fingerprint(other._runtime, other._options) != one  # type: ignore[arg-type]


async def test_conversations_at_once_are_all_saved_and_restored(smollm2: str, tmp_path: Path):
    where = Places(str(tmp_path), 1 << 30)
    talks = [[user(f"{story(seed, 260)}. What is this?")] for seed in range(10, 10 + SLOTS)]
    async with loaded(smollm2, where) as engine:
        said = await asyncio.gather(*(say(engine, messages, 8) for messages in talks))
        assert (await engine.save()).sequences == SLOTS
    async with loaded(smollm2, where) as engine:
        again = await asyncio.gather(*(say(engine, messages, 8) for messages in talks))
    assert [each.text for each in again] == [each.text for each in said]
    for each in again:
        assert each.report.restored_tokens == each.usage["prompt_tokens"] - 1


async def test_several_choices_share_what_one_of_them_restores(talk: Talk, smollm2: str):
    async with loaded(smollm2, talk.places) as engine:
        fields = {"messages": talk.second, "temperature": 0, "max_tokens": 4, "n": 3}
        reply = await engine.call(Call(CHAT, fields, "r", slots=3))
        async with aclosing(reply.chunks) as chunks:
            answer = json.loads(b"".join([chunk async for chunk in chunks]))
        texts = {choice["message"]["content"] for choice in answer["choices"]}
        assert len(texts) == 1
        assert talk.said.text.startswith(texts.pop())
        assert reply.report.restored_tokens == talk.said.cached
        alone = await say(engine, talk.second, 4)
        assert alone.cached == alone.usage["prompt_tokens"] - 1


async def test_what_finds_no_room_or_no_time_is_not_saved(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async with loaded(smollm2, Places(str(tmp_path), 1 << 20)) as engine:
        await say(engine, [user(story(3, 260))], 1)
        assert (await engine.save()).bytes == 0
        assert "more than the store may hold" in caplog.text
    async with loaded(smollm2, Places(str(tmp_path), 1 << 30)) as engine:
        await say(engine, [user(story(3, 260))], 1)
        monkeypatch.setattr(conversations_module, "SAVE_S", 0.0)
        assert await engine.save() == Saving(0, 0, ANY)
        assert "no time to write it" in caplog.text


async def test_a_store_that_hangs_is_left_aside(talk: Talk, smollm2: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversations_module, "RECALL_S", 0.05)
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with loaded(smollm2, talk.places) as engine:

        def hang(*_: Any) -> None:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

        monkeypatch.setattr(engine._store, "find", hang)
        first = await say(engine, talk.second)
        assert (first.text, first.report.restored_tokens) == (talk.said.text, 0)
        other = await say(engine, [user(story(4, 260))], 1)
        assert other.report.restored_tokens is None, "nobody waits for it again"
        release.set()


async def test_short_prompts_and_embeddings_are_not_looked_for(talk: Talk, smollm2: str):
    async with loaded(smollm2, talk.places) as engine:
        assert (await say(engine, [user("Hello")], 2)).report.restored_tokens is None
        answer = await body(engine, {"input": talk.first[0]["content"]}, "/v1/embeddings")
        assert answer["usage"]["prompt_tokens"] > 256
        assert (await body(engine, ask("Hello", max_tokens=2)))["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("what", "value"),
    [("llama_model_is_recurrent", True), ("llama_model_is_hybrid", True), ("llama_model_n_swa", 512)],
)
async def test_a_state_that_cannot_be_cut_is_not_saved(
    talk: Talk, smollm2: str, monkeypatch: pytest.MonkeyPatch, what: str, value: int
):
    import llama_cpp

    monkeypatch.setattr(llama_cpp, what, lambda model: value)
    async with loaded(smollm2, talk.places) as engine:
        assert engine._conversations is None
        assert (await say(engine, talk.first, 1)).report.restored_tokens is None
        assert await engine.save() == Saving(0, 0, 0.0)
