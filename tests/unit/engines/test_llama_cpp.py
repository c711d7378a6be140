"""The llama.cpp engine with real weights: what requests may ask for, and how sequences share the model."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion

from cluster.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    ModelUnavailable,
    PoolError,
    UnsupportedParameter,
)
from deployments.engines.chat import generation as generation_module
from deployments.engines.llama_cpp import loop as loop_module
from deployments.engines.llama_cpp import team
from deployments.engines.llama_cpp.engine import LlamaCppEngine
from deployments.engines.llama_cpp.loop import COMPUTE_NICE
from deployments.engines.llama_cpp.sampling import Sampler
from deployments.engines.protocol import Call
from tests.unit.engines.drive import CHAT, COMPLETIONS, SEA, WEATHER, ask, body, events, stream_of, text


def loop_of(engine: LlamaCppEngine) -> Any:
    return engine._loop


def threads() -> int:
    """All of this process, those of native libraries too."""
    return len(list(Path("/proc/self/task").iterdir()))


def stream_text(raw: bytes) -> str:
    """The text of a whole chat stream."""
    chunks = [json.loads(event[6:]) for event in raw.split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def became_idle(engine: LlamaCppEngine) -> bool:
    """Whether every sequence is freed, after one more step of the decode loop at most; a busy machine steps slowly."""
    loop = loop_of(engine)
    deadline = time.monotonic() + 10
    while not loop.idle and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    return bool(loop.idle)


async def test_info(engine: LlamaCppEngine) -> None:
    info = engine.info()
    assert info.context_length == 1024
    assert info.paths >= {CHAT, COMPLETIONS}
    assert info.format == "gguf"
    assert info.memory_mib
    assert 200 < info.memory_mib < 400


async def test_the_answers_model_is_the_requests(engine: LlamaCppEngine) -> None:
    assert (await body(engine, ask(SEA, model="alias", max_tokens=1)))["model"] == "alias"
    assert (await body(engine, ask(SEA, max_tokens=1)))["model"] == "smollm2"


async def test_a_second_request_reuses_the_common_prefix(engine: LlamaCppEngine) -> None:
    prompt = "Summarize: " + "the quick brown fox jumps over the lazy dog " * 10
    first = (await body(engine, ask(prompt, max_tokens=4)))["usage"]
    again = (await body(engine, ask(prompt, max_tokens=4)))["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] < 50 < first["prompt_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1
    other = (await body(engine, ask(prompt + "and the end", max_tokens=4)))["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] > 90


async def test_requests_at_once_share_a_long_beginning(engine: LlamaCppEngine) -> None:
    prompt = "Consider this list of things: " + "apple pear plum cherry grape melon " * 20
    bodies = await asyncio.gather(*(body(engine, ask(f"{prompt} {n}", max_tokens=3)) for n in range(4)))
    cached = sorted(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in bodies)
    assert cached[0] < 60, "one of them evaluates the prompt"
    assert cached[1] > 100, "the others copy what it evaluated"
    alone = await text(engine, ask(f"{prompt} 3", max_tokens=3))
    assert bodies[3]["choices"][0]["message"]["content"] == alone


async def test_a_long_prompt_does_not_stall_a_running_stream(engine: LlamaCppEngine) -> None:
    order: list[str] = []
    running = asyncio.Event()

    async def short() -> None:
        async for _ in stream_of(engine, Call(CHAT, ask(SEA, stream=True, max_tokens=60, ignore_eos=True), "s")):
            order.append("s")
            running.set()

    async def long() -> None:
        await running.wait()
        order.append("submitted")
        prompt = " ".join(str(number) for number in range(150))
        async for _ in stream_of(engine, Call(CHAT, ask(prompt, stream=True, max_tokens=1), "l")):
            order.append("l")

    await asyncio.gather(short(), long())
    between = order[order.index("submitted") : order.index("l")].count("s")
    # About 540 prompt tokens in pieces of 63: the stream gets a token between any two pieces.
    assert between >= 6


async def test_closing_the_iterator_frees_the_sequence(engine: LlamaCppEngine) -> None:
    async with aclosing(
        stream_of(engine, Call(CHAT, ask(SEA, stream=True, max_tokens=900, ignore_eos=True), "c"))
    ) as s:
        async for _ in s:
            break
        assert not loop_of(engine).idle
    assert await became_idle(engine)


async def test_cancelling_waiting_requests_frees_them_too(engine: LlamaCppEngine) -> None:
    calls = [asyncio.ensure_future(text(engine, ask(SEA, max_tokens=900, ignore_eos=True))) for _ in range(12)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert await became_idle(engine)
    assert await text(engine, ask(SEA, max_tokens=2))


async def test_more_sequences_than_slots_wait_their_turn(engine: LlamaCppEngine) -> None:
    answer = await body(engine, {"prompt": ["One", "Two", "Three"], "n": 4, "max_tokens": 3}, COMPLETIONS)
    Completion.model_validate(answer)
    assert [choice["index"] for choice in answer["choices"]] == list(range(12))
    assert answer["usage"]["completion_tokens"] <= 36


@pytest.mark.parametrize("width", [1, 3])
async def test_a_request_runs_as_many_sequences_as_it_has_slots(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    alive: set[int] = set()
    peak = 0

    class Counted(Sampler):
        def __init__(self, *arguments: Any) -> None:
            nonlocal peak
            super().__init__(*arguments)
            alive.add(id(self))
            peak = max(peak, len(alive))

        def close(self) -> None:
            super().close()
            alive.discard(id(self))

    monkeypatch.setattr(loop_module, "Sampler", Counted)
    fields = {"prompt": ["One", "Two"], "n": 3, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    reply = await engine.call(Call(COMPLETIONS, fields, "w", slots=width))
    assert not alive, "samplers are made when their sequence starts"
    answer = json.loads(b"".join([chunk async for chunk in reply.chunks]))
    assert peak == width
    assert not alive
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len({choice["text"] for choice in answer["choices"]}) == 2
    assert reply.report.output_tokens == 18


async def test_closing_a_request_forgets_the_sequences_that_had_not_started(engine: LlamaCppEngine) -> None:
    fields = {"prompt": ["One"] * 9, "max_tokens": 400, "ignore_eos": True, "stream": True}
    reply = await engine.call(Call(COMPLETIONS, fields, "w", slots=2))
    assert await anext(reply.chunks)
    await reply.chunks.aclose()
    assert await became_idle(engine)
    assert reply.report.output_tokens
    assert reply.report.output_tokens < 400


async def test_a_reader_that_is_behind_pauses_its_own_sequence_only(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_module, "MAX_UNREAD", 16)
    fields = ask(SEA, stream=True, max_tokens=120, ignore_eos=True)
    expected = await text(engine, {**fields, "stream": False})
    reply = await engine.call(Call(CHAT, fields, "slow"))
    raw = await anext(reply.chunks)
    (slot,) = [slot for slot in loop_of(engine)._slots if slot.generation]
    slow = slot.generation
    deadline = time.monotonic() + 60
    while not slow.job.mailbox.paused and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    produced = slow.produced
    assert 16 < produced < 60
    assert await text(engine, ask(SEA, max_tokens=40, ignore_eos=True)), "others go on"
    assert slow.produced <= produced + 1, "it waits for its reader"
    raw += b"".join([chunk async for chunk in reply.chunks])
    assert stream_text(raw) == expected
    assert await became_idle(engine)


async def test_a_reader_that_is_behind_and_leaves_frees_its_sequence(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_module, "MAX_UNREAD", 4)
    reply = await engine.call(Call(CHAT, ask(SEA, stream=True, max_tokens=900, ignore_eos=True), "slow"))
    assert await anext(reply.chunks)
    (slot,) = [slot for slot in loop_of(engine)._slots if slot.generation]
    deadline = time.monotonic() + 60
    while not slot.generation.job.mailbox.paused and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    await reply.chunks.aclose()
    assert await became_idle(engine)


@pytest.mark.parametrize("fields", [{"max_tokens": 4}, {"max_tokens": None}])
async def test_a_prompt_beyond_the_context_is_refused(engine: LlamaCppEngine, fields: dict[str, Any]) -> None:
    steps = loop_of(engine).steps
    with pytest.raises(ContextLengthExceeded) as refused:
        await body(engine, ask("word " * 1100, **fields))
    assert refused.value.status == 400
    with pytest.raises(ContextLengthExceeded):
        await body(engine, ask("word", max_tokens=1020))
    assert loop_of(engine).steps == steps, "refused before the engine was touched"


async def test_without_max_tokens_the_context_is_the_limit(engine: LlamaCppEngine) -> None:
    answer = await body(engine, ask("word " * 960, max_tokens=None, ignore_eos=True))
    assert answer["usage"]["total_tokens"] == 1024
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_clamped_max_tokens_are_a_bound_and_no_reason_to_refuse(engine: LlamaCppEngine) -> None:
    answer = await body(engine, ask("word " * 960, max_tokens=32_000, clamp_max_tokens=True, ignore_eos=True))
    assert answer["usage"]["total_tokens"] == 1024
    prompt = {"prompt": "word " * 1000, "temperature": 0, "clamp_max_tokens": True, "ignore_eos": True}
    assert (await body(engine, prompt, COMPLETIONS))["usage"]["total_tokens"] == 1024


async def test_an_answer_goes_on_where_the_assistants_text_ends(engine: LlamaCppEngine) -> None:
    said = [{"role": "user", "content": "Count from 1 to 9."}, {"role": "assistant", "content": "1, 2, 3, 4, "}]
    fields = {"messages": said, "temperature": 0, "max_tokens": 6, "continue_final_message": True}
    assert (await body(engine, fields))["choices"][0]["message"]["content"].startswith("5, 6")


async def test_json_object_answers_are_objects(engine: LlamaCppEngine) -> None:
    fields = ask('Answer with {"ok": true}', response_format={"type": "json_object"}, max_tokens=150)
    choice = (await body(engine, fields))["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    "schema", [{"$ref": "#/nowhere"}, {"type": "nonsense"}, {"type": "object", "properties": {"a": 1}}]
)
async def test_an_impossible_schema_is_refused(engine: LlamaCppEngine, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(InvalidRequest) as refused:
        await body(engine, ask(SEA, response_format=form))
    assert refused.value.param == "response_format"


async def test_a_broken_grammar_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(InvalidRequest):
        await body(engine, ask(SEA, grammar="root ::= ("))


async def test_tool_choice_none_never_calls(engine: LlamaCppEngine) -> None:
    answer = await body(engine, ask("What is the weather?", tools=[WEATHER], tool_choice="none"))
    assert "tool_calls" not in answer["choices"][0]["message"]
    plain = await body(engine, ask("What is the weather?"))
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


async def test_completion_logprobs_with_echo_score_the_prompt(engine: LlamaCppEngine) -> None:
    fields = {"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0, "logprobs": 2, "echo": True}
    answer = await body(engine, fields, COMPLETIONS)
    choice = answer["choices"][0]
    assert choice["text"].startswith("The capital of France is")
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert all(value < 0 for value in scores["token_logprobs"][1:])
    assert len(scores["tokens"]) == answer["usage"]["total_tokens"]
    assert "".join(scores["tokens"]) == choice["text"]


async def test_prompts_as_text_and_as_tokens_are_the_same(engine: LlamaCppEngine) -> None:
    tokens = engine._runtime.tokenize("Once upon a time", add_special=True, parse_special=True)  # type: ignore[union-attr]
    answers = [
        await body(engine, {"prompt": prompt, "max_tokens": 8, "temperature": 0}, COMPLETIONS)
        for prompt in ("Once upon a time", ["Once upon a time"], tokens, [tokens])
    ]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    with pytest.raises(InvalidRequest):
        await body(engine, {"prompt": [10**9]}, COMPLETIONS)


async def test_logit_bias_forces_and_forbids(engine: LlamaCppEngine) -> None:
    runtime = engine._runtime
    assert runtime
    token = runtime.tokenize(" blue", add_special=False, parse_special=False)[0]
    assert await text(engine, ask(SEA, logit_bias={str(token): 100}, max_tokens=3)) == " blue blue blue"
    first = (await text(engine, ask(SEA, max_tokens=1))).strip()
    forbidden = runtime.tokenize(first, add_special=False, parse_special=False)[0]
    assert (await text(engine, ask(SEA, max_tokens=1, logit_bias={str(forbidden): -100}))).strip() != first


async def test_a_character_of_several_tokens_is_shown_whole(engine: LlamaCppEngine) -> None:
    answer = ask("Say it.", grammar='root ::= "👋🏽é" "世"', max_tokens=30)
    assert await text(engine, answer) == "👋🏽é世"
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in await events(engine, answer)]
    assert "".join(pieces) == "👋🏽é世"
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= 3


async def test_thoughts_that_the_model_marks_are_no_text(engine: LlamaCppEngine) -> None:
    answer = ask("Think.", grammar='root ::= "<think>\\nHmm.</think>\\n\\nYes <b>."', max_tokens=40)
    message = (await body(engine, answer))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hmm.", "Yes <b>.")
    deltas = [chunk["choices"][0]["delta"] for chunk in await events(engine, answer)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hmm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes <b>."


@pytest.mark.parametrize(
    ("fields", "path", "param"),
    [
        ({"prompt": "x", "suffix": "y"}, COMPLETIONS, "suffix"),
        ({"prompt": "x", "best_of": 3}, COMPLETIONS, "best_of"),
        (ask("x", modalities=["audio"]), CHAT, "modalities"),
        (ask("x", reasoning_effort="high"), CHAT, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, CHAT, "messages"),
    ],
)
async def test_what_it_cannot_do_is_refused(
    engine: LlamaCppEngine, fields: dict[str, Any], path: str, param: str
) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        await body(engine, fields, path)
    assert refused.value.param == param


async def test_a_failed_decode_fails_its_batch_and_serving_goes_on(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await text(engine, ask(SEA))
    runtime = engine._runtime
    decode = runtime.decode  # type: ignore[union-attr]

    def fails_once() -> int:
        monkeypatch.undo()
        decode()
        return -3

    monkeypatch.setattr(runtime, "decode", fails_once)
    with pytest.raises(BackendUnavailable):
        await text(engine, ask(SEA))
    assert await text(engine, ask(SEA)) == expected


async def test_unload_during_a_call_fails_it_and_is_idempotent(smollm2: str) -> None:
    engine = LlamaCppEngine(smollm2, model_id="m", slots=2, n_ctx=512)
    progress: list[float] = []
    await engine.load(progress.append)
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    stream = stream_of(engine, Call(CHAT, ask(SEA, stream=True, max_tokens=400, ignore_eos=True), "u"))
    assert b"data: " in await anext(stream)
    waiting = [asyncio.ensure_future(text(engine, ask(SEA, max_tokens=400, ignore_eos=True))) for _ in range(3)]
    await asyncio.sleep(0)
    await engine.unload()
    with pytest.raises(BackendUnavailable):
        async for _ in stream:
            pass
    failures = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(failure, BackendUnavailable) for failure in failures)
    await engine.unload()
    with pytest.raises(BackendUnavailable):
        await text(engine, ask(SEA))


@pytest.mark.skipif(sys.platform != "linux", reason="counts the process's threads in /proc")
async def test_loading_leaves_no_threads_behind(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One team of OpenMP threads in the process: with a second one, from the load, every step takes twice as long."""
    # Three threads may be more than there are cores: the team stays as it is.
    monkeypatch.setattr(team, "WINDOW_S", 3600.0)
    before = threads()
    engine = LlamaCppEngine(smollm2, model_id="m", slots=2, n_ctx=512, n_threads=3)
    await engine.load(lambda fraction: None)
    await text(engine, ask(SEA, max_tokens=2))
    deadline = time.monotonic() + 10
    while (grown := threads() - before) > 3 and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert grown == 3
    await engine.unload()


@pytest.mark.skipif(sys.platform != "linux", reason="a niceness is a thread's own only there")
def test_decoding_is_nicer_than_the_process_whatever_its_own_niceness(smollm2: str) -> None:
    async def niceness() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 12)
        engine = LlamaCppEngine(smollm2, model_id="m", slots=1, n_ctx=512)
        await engine.load(lambda fraction: None)
        await text(engine, ask(SEA, max_tokens=1))
        found = os.getpriority(os.PRIO_PROCESS, loop_of(engine)._thread.native_id)
        await engine.unload()
        return found

    with ThreadPoolExecutor(1) as apart:
        assert apart.submit(asyncio.run, niceness()).result() == 12 + COMPUTE_NICE


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Any) -> None:
    pytest.importorskip("llama_cpp")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    for path, reason in ((broken, "could not load"), (tmp_path / "missing.gguf", "does not exist")):
        with pytest.raises(ModelUnavailable, match=reason) as refused:
            await LlamaCppEngine(str(path), model_id="m", slots=1).load(lambda fraction: None)
        assert str(tmp_path) not in refused.value.message


@pytest.mark.parametrize("fields", [{"flash_attn": "maybe"}, {"type_k": "q3"}])
def test_unknown_options_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PoolError):
        LlamaCppEngine("x.gguf", model_id="m", slots=1, **fields)
