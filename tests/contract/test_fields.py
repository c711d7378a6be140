"""What a request may ask of an engine: it is honoured, or refused by its name, and never ignored."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.errors import PoolError
from tests.contract.entry import Entry
from tests.contract.pool import OneModel
from tests.contract.said import assert_refused, finish_of, pieces_of, streamed_text, text_of
from tests.unit.engines.drive import COMPLETIONS, PERSON, SEA, WEATHER, ask


async def test_a_stop_string_of_several_tokens_cuts_and_never_leaks(engine: OneModel):
    whole = text_of(await engine.body(ask(SEA)))
    words = whole.split()
    # The end of one word and the beginning of the next: it begins and ends within tokens.
    stop = f"{words[4][1:]} {words[5][:2]}"
    expected = whole[: whole.index(stop)]
    answer = await engine.body(ask(SEA, stop=[stop, "never"]))
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == (expected, "stop")
    chunks = await engine.events(ask(SEA, stop=stop))
    assert (streamed_text(chunks), finish_of(chunks)) == (expected, "stop")
    assert text_of(await engine.body(ask(SEA, stop=["never"]))) == whole


async def test_characters_of_several_tokens_are_whole_in_a_stream(engine: OneModel, entry: Entry):
    if not entry.writes:
        pytest.skip("it says nothing but its own words")
    fields = {"prompt": "🌊 世界 " * 6 + "🌊", "temperature": 0, "max_tokens": 30}
    whole = text_of(await engine.body(fields, COMPLETIONS))
    pieces = pieces_of(await engine.events(fields, COMPLETIONS))
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert "".join(pieces) == whole
    assert whole.startswith(" 世界 🌊"), "it goes on as the prompt does"
    assert len(pieces) > 5


async def test_a_seed_reproduces_and_another_differs(engine: OneModel, entry: Entry):
    def fields(seed: int) -> dict[str, Any]:
        return ask(SEA, temperature=1.0, top_p=0.95, seed=seed, max_tokens=16)

    if "seed" in entry.cannot:
        return await assert_refused(engine, fields(7), "seed")
    one, again, other = [text_of(await engine.body(fields(seed))) for seed in (7, 7, 8)]
    assert one == again
    assert one != other or not entry.writes


async def test_log_probabilities(engine: OneModel, entry: Entry):
    fields = ask(SEA, logprobs=True, top_logprobs=3, max_tokens=6)
    if "logprobs" in entry.cannot:
        await assert_refused(engine, {"prompt": SEA, "logprobs": 2}, "logprobs", COMPLETIONS)
        return await assert_refused(engine, fields, "logprobs")
    answer = await engine.body(fields)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 6
    for each in entries:
        total = sum(math.exp(other["logprob"]) for other in each["top_logprobs"])
        assert 0.0 < total <= 1.001
        assert each["logprob"] == pytest.approx(each["top_logprobs"][0]["logprob"], abs=1e-4), "greedy"
        assert len(each["top_logprobs"]) == 3
    assert b"".join(bytes(each["bytes"]) for each in entries).decode() == text_of(answer)
    chunks = await engine.events(fields)
    streamed = [
        each
        for chunk in chunks
        for choice in chunk["choices"]
        for each in (choice.get("logprobs") or {}).get("content") or ()
    ]
    assert [each["token"] for each in streamed] == [each["token"] for each in entries]


@pytest.mark.parametrize("topic", ["a king", "Ada"])
async def test_an_answer_of_a_json_schema_is_valid(engine: OneModel, entry: Entry, topic: str):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    fields = ask(f"Describe {topic} as JSON.", response_format=form, max_tokens=80)
    if "response_format" in entry.cannot:
        return await assert_refused(engine, fields, "response_format")
    answer = await engine.body(fields)
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text_of(answer)), PERSON)


async def test_a_schema_that_nothing_can_meet_is_refused(engine: OneModel, entry: Entry):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    if entry.relays:
        with pytest.raises(PoolError, match="schema"):
            await engine.body(ask(SEA, response_format=form))
        return
    await assert_refused(engine, ask(SEA, response_format=form), "response_format")


async def test_a_tool_is_called_and_its_result_taken(engine: OneModel, entry: Entry):
    entry.skip_if_passed_on("tool_choice")
    named = {"type": "function", "function": {"name": "get_weather"}}
    fields = ask("What is the weather in Oslo?", tools=[WEATHER], tool_choice=named, max_tokens=80)
    if "tool_choice" in entry.cannot:
        await assert_refused(engine, fields, "tool_choice")
        await assert_refused(engine, {**fields, "tool_choice": "required"}, "tool_choice")
        call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    else:
        answer = ChatCompletion.model_validate(await engine.body(fields)).choices[0]
        assert answer.message.tool_calls
        made = answer.message.tool_calls[0]
        assert made.type == "function"
        assert made.function.name == "get_weather"
        jsonschema.validate(json.loads(made.function.arguments), WEATHER["function"]["parameters"])
        required = {**fields, "tool_choice": "required"}
        chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in await engine.events(required)]
        deltas = [delta for chunk in chunks for each in chunk.choices for delta in each.delta.tool_calls or ()]
        assert deltas[0].id
        assert deltas[0].function
        assert deltas[0].function.name == "get_weather"
        streamed = "".join(d.function.arguments or "" for d in deltas if d.function)
        # The same call; an engine that parses what its model has written may write it in another way.
        assert json.loads(streamed) == json.loads(made.function.arguments)
        assert len(deltas) > 3, "arguments are streamed"
        call = made.model_dump(exclude_none=True)
    said = [
        *fields["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "Oslo: 3 degrees C, rain."},
    ]
    answer = await engine.body({**fields, "messages": said, "tool_choice": "auto", "max_tokens": 24})
    assert ChatCompletion.model_validate(answer).choices[0].message.content


async def test_tools_that_may_not_be_called_are_not(engine: OneModel, entry: Entry):
    asked = ask("What is the weather?", max_tokens=8)
    answer = await engine.body({**asked, "tools": [WEATHER], "tool_choice": "none"})
    assert not answer["choices"][0]["message"].get("tool_calls")
    assert text_of(answer)


async def test_choices_are_separate(engine: OneModel, entry: Entry):
    fields = ask(SEA, n=2, temperature=1.0, max_tokens=12)
    if "n" in entry.cannot:
        return await assert_refused(engine, fields, "n")
    if "seed" not in entry.cannot:
        fields["seed"] = 5
    choices = (await engine.body(fields))["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    texts = [choice["message"]["content"] for choice in choices]
    assert texts[0] != texts[1] or not entry.writes
    chunks = await engine.events(fields)
    assert all(finish_of(chunks, index) for index in (0, 1))
    if "seed" not in entry.cannot:
        assert [streamed_text(chunks, index) for index in (0, 1)] == texts


@pytest.mark.parametrize("field", ["frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"])
async def test_what_moves_the_scores_changes_the_answer_or_is_refused(engine: OneModel, entry: Entry, field: str):
    if not entry.writes:
        pytest.skip("it has no scores")
    entry.skip_if_passed_on(field)
    # Long enough to say many words again, none of which is certain: a penalty for having been said counts once.
    prompt = "Tell a long story about a dog."
    value: Any = {"logit_bias": {"260": 100}}.get(field, 1.9)
    if field in entry.cannot:
        return await assert_refused(engine, ask(prompt, **{field: value}), field)
    asked = ask(prompt, max_tokens=60)
    plain, moved = await asyncio.gather(engine.body(asked), engine.body({**asked, field: value}))
    assert text_of(plain) != text_of(moved)


@pytest.mark.parametrize(
    ("fields", "param"), [({"modalities": ["audio"]}, "modalities"), ({"reasoning_effort": "high"}, "reasoning_effort")]
)
async def test_what_no_engine_here_can_is_refused(engine: OneModel, entry: Entry, fields: dict[str, Any], param: str):
    if not entry.writes or entry.relays:
        pytest.skip("it has no model that could, or is asked as it is")
    await assert_refused(engine, ask(SEA, **fields), param)
