"""Whatever engine runs below: the same answers in the same shapes, counted right."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.errors import ContextLengthExceeded
from tests.contract.entry import Entry, Reference
from tests.contract.pool import SLOTS, OneModel
from tests.contract.said import finish_of, pieces_of, streamed_text, text_of
from tests.unit.engines.drive import COMPLETIONS, SEA, ask

TOPICS = ["the sea", "the moon", "bread", "music", "a dog", "rain", "chess", "gold"]
USAGE = {"include_usage": True}


async def test_chat_streamed_and_not(engine: OneModel, entry: Entry):
    whole = await engine.body(ask(SEA))
    ChatCompletion.model_validate(whole)
    chunks = await engine.events(ask(SEA, stream_options=USAGE))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert streamed_text(chunks) == text_of(whole) != ""
    assert finish_of(chunks) == whole["choices"][0]["finish_reason"]
    assert chunks[0]["choices"][0]["delta"]["role"] == whole["choices"][0]["message"]["role"] == "assistant"
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len(pieces_of(chunks)) > 10, "tokens come one by one"
    assert whole["model"] == chunks[0]["model"] == "m"


async def test_completions_streamed_and_not(engine: OneModel):
    fields = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
    whole = await engine.body(fields, COMPLETIONS)
    Completion.model_validate(whole)
    chunks = await engine.events({**fields, "stream_options": USAGE}, COMPLETIONS)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert streamed_text(chunks) == text_of(whole) != ""
    assert finish_of(chunks) == whole["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 12


async def test_several_prompts_and_choices_are_answered_in_order(engine: OneModel, entry: Entry):
    entry.skip_if_passed_on("several prompts")
    fields = {"prompt": ["One, two,", "Red, green,"], "temperature": 0, "max_tokens": 4}
    answer = await engine.body(fields, COMPLETIONS)
    alone = [await engine.body({**fields, "prompt": prompt}, COMPLETIONS) for prompt in fields["prompt"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [text_of(answer, index)[:3] for index in (0, 1)] == [text_of(one)[:3] for one in alone]
    assert answer["usage"]["completion_tokens"] == 8


async def test_usage_is_what_the_tokenizer_says(engine: OneModel, reference: Reference):
    messages = [{"role": "user", "content": "Name three colors. Grün, 青い, 🟥?"}]
    answer = await engine.body({"messages": messages, "temperature": 0, "max_tokens": 12})
    usage = answer["usage"]
    assert usage["prompt_tokens"] == reference.count_chat(messages)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    said = reference.count(text_of(answer))
    # The token that ends an answer is counted, and has no text.
    assert usage["completion_tokens"] - said == (answer["choices"][0]["finish_reason"] == "stop")


async def test_greedy_answers_are_the_librarys_own(engine: OneModel, reference: Reference):
    prompts = [f"Write two sentences about {topic}." for topic in TOPICS[:3]]
    expected = [await asyncio.to_thread(reference.greedy, prompt, 16) for prompt in prompts]
    assert [text_of(await engine.body(ask(prompt, max_tokens=16))) for prompt in prompts] == expected


@pytest.mark.parametrize("tokens", [1, 7])
async def test_max_tokens_is_exact(engine: OneModel, tokens: int):
    for field in ("max_tokens", "max_completion_tokens"):
        fields = {"messages": ask(SEA)["messages"], "temperature": 0, field: tokens, "stream_options": USAGE}
        chunks = await engine.events(fields)
        assert chunks[-1]["usage"]["completion_tokens"] == tokens
        assert finish_of(chunks) == "length"


async def test_the_answers_end_is_the_models(engine: OneModel, entry: Entry):
    if not entry.writes:
        pytest.skip("it ends where it is told to")
    answer = await engine.body(ask(SEA, max_tokens=100))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "<|" not in text_of(answer), "no control token is text"


async def test_a_prompt_beyond_the_context_is_refused(engine: OneModel, entry: Entry):
    if not entry.writes:
        pytest.skip("it has no context")
    for stream in (False, True):
        with pytest.raises(ContextLengthExceeded) as refused:
            await engine.body(ask("word " * 3000, stream=stream))
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


async def test_times_are_measured_and_nested(engine: OneModel):
    body = await engine.body(ask(SEA))
    (last,) = [event for event in await engine.events(ask(SEA, stream_options=USAGE)) if "metrics" in event]
    for metrics in (body["metrics"], last["metrics"]):
        outer, inner = metrics["pool_total_wall_ms"], metrics["engine_total_wall_ms"]
        assert outer >= inner >= (metrics["backend_inference_wall_ms"] or 0.0) >= 0.0
        assert metrics["engine_output_tokens"] > 0


async def test_eight_at_once_are_answered_as_if_alone(engine: OneModel):
    prompts = [f"Write two sentences about {topic}." for topic in TOPICS]
    assert len(prompts) == SLOTS
    fields: list[dict[str, Any]] = [ask(prompt, max_tokens=8, stream_options=USAGE) for prompt in prompts]
    alone = [streamed_text(await engine.events(each)) for each in fields]
    together = await asyncio.gather(*map(engine.events, fields))
    assert [chunks[-1]["usage"]["completion_tokens"] for chunks in together] == [8] * SLOTS
    # A batch may be rounded in another order: of two first words that are nearly as likely the other may win.
    same = [streamed_text(chunks)[:4] == text[:4] for chunks, text in zip(together, alone, strict=True)]
    assert sum(same) >= SLOTS - 1, (together, alone)
