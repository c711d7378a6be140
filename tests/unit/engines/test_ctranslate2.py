"""CTranslate2 without CTranslate2: which sequences make a batch, what becomes of each, and what a folder must hold."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import ModelConfig
from cluster.errors import BackendUnavailable, ModelUnavailable
from deployments.engines.chat.generation import Delta, Generation, Mailbox
from deployments.engines.chat.hf_folder import DEFAULT_CONTEXT
from deployments.engines.chat.request import Sampling
from deployments.engines.chat.utf8 import TextAssembler
from deployments.engines.ctranslate2.batches import SPREAD, Batches, Ct2Job
from deployments.engines.ctranslate2.folder import Ct2Folder
from deployments.engines.ctranslate2.prepare import Ct2Vocabulary, Decoding
from deployments.engines.registry import estimate_mib

pytest.importorskip("tokenizers")

END = 0


def vocabulary() -> Ct2Vocabulary:
    """Words `w0`, `w1`, …; the first ends an answer."""
    from tokenizers import Tokenizer, decoders, models

    words = {f"w{index} ": index for index in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w99 "))
    tokenizer.decoder = decoders.Fuse()
    return Ct2Vocabulary(tokenizer, "", 1000)


class Generator:
    """Decodes every prompt as its own last token, the next one, and so on; a batch waits until it is told to go on."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[list[str]], dict[str, Any]]] = []
        self.go_on = threading.Event()
        self.error: Exception | None = None

    def generate_batch(self, prompts: list[list[str]], *, callback: Any = None, **how: Any) -> list[Any]:
        self.batches.append((prompts, how))
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        starts = [int(prompt[-1][1:]) for prompt in prompts]
        tokens = [[start + step for step in range(how["max_length"])] for start in starts]
        if callback is None:
            return [SimpleNamespace(sequences_ids=[each]) for each in tokens]
        over: set[int] = set()
        for step in range(how["max_length"]):
            for index, each in enumerate(tokens):
                if index not in over and callback(SimpleNamespace(batch_id=index, token_id=each[step], step=step)):
                    over.add(index)
        return []


class Fixture:
    def __init__(self, workers: int) -> None:
        self.generator = Generator()
        self.vocabulary = vocabulary()
        self.batches = Batches(self.generator, self.vocabulary, [END], workers)

    def job(self, *starts: int, limit: int = 3, length: int = 4, width: int = 8, **how: Any) -> Ct2Job:
        job = Ct2Job(Mailbox(lambda: None), width, decoding=Decoding(**how))
        stops = how.get("stops", ())
        for index, start in enumerate(starts):
            prompt = [99] * (length - 1) + [start]
            job.pending.append(Generation(index, job, prompt, limit, Sampling(), TextAssembler(stops)))
        return job

    async def started(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.generator.batches) < count:
                await asyncio.sleep(0.002)


@pytest.fixture
async def one() -> AsyncIterator[Fixture]:
    fixture = Fixture(workers=1)
    yield fixture
    fixture.generator.go_on.set()
    await fixture.batches.stop()


async def ends(job: Ct2Job, count: int) -> list[Delta]:
    """The last delta of each sequence, by index, with all of its text."""
    texts: dict[int, str] = {}
    last: dict[int, Delta] = {}
    async with asyncio.timeout(10):
        while len(last) < count:
            for delta in await job.mailbox.take():
                texts[delta.index] = texts.get(delta.index, "") + delta.text
                if delta.finish or delta.error:
                    last[delta.index] = delta
    for index, delta in last.items():
        delta.text = texts[index]
    return [last[index] for index in sorted(last)]


async def test_what_comes_together_and_asks_for_the_same_is_decoded_together(one: Fixture):
    alike = [one.job(10), one.job(20, 30, limit=2)]
    other, far = one.job(40, temperature=0.5), one.job(50, length=4 + SPREAD + 1)
    for job in (*alike, other, far):
        one.batches.submit(job)
    one.generator.go_on.set()
    (first,), (second, third) = await ends(alike[0], 1), await ends(alike[1], 2)
    assert (first.text, first.finish) == ("w10 w11 w12 ", "length")
    assert (second.text, third.text) == ("w20 w21 ", "w30 w31 "), "each has its own length"
    assert [each.text for each in [*await ends(other, 1), *await ends(far, 1)]] == ["w40 w41 w42 ", "w50 w51 w52 "]
    assert [len(prompts) for prompts, _ in one.generator.batches] == [3, 1, 1]
    assert one.generator.batches[0][1]["max_length"] == 3
    assert one.generator.batches[1][1]["sampling_temperature"] == 0.5


async def test_the_end_token_ends_an_answer_and_counts(one: Fixture):
    one.generator.go_on.set()
    job = one.job(END)
    (generation,) = job.pending
    one.batches.submit(job)
    (delta,) = await ends(job, 1)
    assert (delta.text, delta.finish, generation.produced) == ("", "stop", 1)
    assert generation.started_at
    assert generation.ended_at >= generation.first_token_at > 0


async def test_beams_have_no_tokens_on_the_way(one: Fixture):
    one.generator.go_on.set()
    job = one.job(10, beam_size=4, limit=3)
    one.batches.submit(job)
    (delta,) = await ends(job, 1)
    assert (delta.text, delta.finish) == ("w10 w11 w12 ", "length")
    assert one.generator.batches[0][1]["beam_size"] == 4


async def test_a_call_runs_as_many_sequences_as_it_has_slots(one: Fixture):
    one.generator.go_on.set()
    job = one.job(10, 20, 30, width=2)
    one.batches.submit(job)
    assert [delta.text[:4] for delta in await ends(job, 3)] == ["w10 ", "w20 ", "w30 "]
    assert [len(prompts) for prompts, _ in one.generator.batches] == [2, 1]


async def test_what_was_cancelled_ends_and_what_waits_is_forgotten(one: Fixture):
    running, waiting, next_one = one.job(10, limit=50), one.job(20), one.job(30)
    one.batches.submit(running)
    await one.started(1)
    one.batches.submit(waiting)
    one.batches.submit(next_one)
    (generation,) = one.batches._generations
    one.batches.cancel(running)
    one.batches.cancel(waiting)
    one.generator.go_on.set()
    assert [delta.text for delta in await ends(next_one, 1)] == ["w30 w31 w32 "]
    assert generation.produced == 0
    assert [prompts[0][-1] for prompts, _ in one.generator.batches] == ["w10 ", "w30 "]


async def test_a_batch_that_fails_fails_its_own_sequences_only(one: Fixture):
    one.generator.error = RuntimeError("out of memory")
    one.generator.go_on.set()
    job = one.job(10, 20)
    one.batches.submit(job)
    assert all(isinstance(delta.error, BackendUnavailable) for delta in await ends(job, 2))
    one.generator.error = None
    again = one.job(10)
    one.batches.submit(again)
    assert [delta.text for delta in await ends(again, 1)] == ["w10 w11 w12 "]


async def test_an_unload_fails_what_runs_and_what_waits():
    fixture = Fixture(workers=1)
    running, waiting = fixture.job(10), fixture.job(20, temperature=0.5)
    fixture.batches.submit(running)
    await fixture.started(1)
    fixture.batches.submit(waiting)
    stopping = asyncio.create_task(fixture.batches.stop())
    for job in (running, waiting):
        assert isinstance((await ends(job, 1))[0].error, BackendUnavailable)
    fixture.generator.go_on.set()
    await stopping
    with pytest.raises(BackendUnavailable):
        fixture.batches.submit(fixture.job(30))


def folder(path: Path, **files: Any) -> Path:
    for name, content in {"model.bin": "x", "config.json": {}, "tokenizer.json": {}, **files}.items():
        if content is not None:
            path.joinpath(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("missing", ["model.bin", "config.json", "tokenizer.json"])
def test_a_folder_that_was_not_converted_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ModelUnavailable, match=missing) as refused:
        Ct2Folder(folder(tmp_path, **{missing: None}))
    assert str(tmp_path.parent) not in refused.value.message


def test_a_folder_says_how_its_model_is_spoken_to(tmp_path: Path) -> None:
    tokens = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<end>",
        "model_max_length": 2048,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    found = Ct2Folder(
        folder(
            tmp_path,
            **{
                "tokenizer_config.json": tokens,
                "config.json": {"eos_token": "</s>"},
                "generation_config.json": {"eos_token_id": [2, 7]},
            },
        )
    )
    assert (found.bos, found.ends, found.end_ids) == ("<s>", ["<end>", "</s>"], [2, 7])
    assert (found.context_length, found.chat_template, found.weights_mib) == (2048, "D", 1)
    (tmp_path / "chat_template.jinja").write_text("J")
    assert found.chat_template == "J"


def test_a_folder_that_says_nothing_has_defaults(tmp_path: Path) -> None:
    found = Ct2Folder(folder(tmp_path, **{"tokenizer_config.json": {"model_max_length": 10**30}}))
    assert (found.bos, found.ends, found.end_ids, found.chat_template) == ("", [], [], None)
    assert found.context_length == DEFAULT_CONTEXT
    folder(tmp_path, **{"tokenizer_config.json": "{"})
    with pytest.raises(ModelUnavailable, match=r"tokenizer_config\.json"):
        Ct2Folder(tmp_path)


def test_the_estimate_is_the_files_size_and_what_comes_on_top(tmp_path: Path) -> None:
    folder(tmp_path, **{"model.bin": "x" * (1 << 20)})

    def estimate(**fields: Any) -> int | None:
        return estimate_mib(ModelConfig.model_validate({"backend": "ct2", "model_path": "/m", **fields}), tmp_path)

    on_cpu = estimate()
    assert on_cpu is not None
    assert estimate(num_gpus=1) == on_cpu + 512 - 64
    assert estimate(compute_type="float32") == on_cpu + 3
    assert estimate(compute_type="int8") == on_cpu
    (tmp_path / "model.bin").unlink()
    assert estimate() is None
