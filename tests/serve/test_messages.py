"""Anthropic's own client over real Serve: messages, streams, tools, tokens, and the prompts of Claude Code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import pytest

from tests.anthropic_events import checked
from tests.pool import Pool, fake, running_pool, smollm2

HI: Any = [{"role": "user", "content": "Hi"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    models = {
        "quick": {**fake(tokens_per_s=1000, tokens=8), "min_replicas": 1},
        "late": fake(load_s=7, tokens=3),
        "full": {**fake(tokens_per_s=10, tokens=20), "target_inflight": 1, "max_queued": 0, "min_replicas": 1},
        "small": smollm2(target_inflight=2, enabled=True),
    }
    with running_pool(port, {"models": models}) as pool:
        yield pool
        pool.check()


@pytest.fixture(scope="module")
def client(pool: Pool) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=pool.url, api_key="none", max_retries=0) as client:
        yield client


def words(count: int) -> str:
    return "".join(f"quick:{index} " for index in range(count))


def test_a_message_and_a_stream(client: anthropic.Anthropic):
    message = client.messages.create(model="quick", max_tokens=8, messages=HI)
    assert message.content[0].text == words(8)
    with client.messages.stream(model="quick", max_tokens=5, messages=HI, system="Be brief.") as stream:
        assert "".join(stream.text_stream) == words(5)
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 5)
    beta = client.beta.messages.create(
        model="quick",
        max_tokens=2,
        messages=[*HI, {"role": "system", "content": "Soon."}, *HI],
        thinking={"type": "adaptive"},
        betas=["context-management-2025-06-27"],
        context_management={"edits": []},
        output_config={"effort": "medium"},
    )
    assert beta.content[0].text == words(2)


def test_errors_are_the_clients_own(client: anthropic.Anthropic, pool: Pool):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="nope", max_tokens=1, messages=HI)
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="quick", max_tokens=0, messages=HI)
    with client.messages.stream(model="full", max_tokens=20, messages=HI) as busy:
        next(iter(busy))
        with pytest.raises(anthropic.ServiceUnavailableError) as refused:
            client.messages.create(model="full", max_tokens=1, messages=HI)
    assert refused.value.type == "overloaded_error"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 20
    assert httpx.head(pool.url).status_code == 200


def test_a_forced_tool_is_called_and_its_result_taken(client: anthropic.Anthropic, pool: Pool):
    asked = {"role": "user", "content": "How is the weather in Paris?"}
    body = {"model": "small", "max_tokens": 64, "tools": [TOOL], "messages": [asked]}
    forced = {**body, "tool_choice": {"type": "tool", "name": "get_weather"}}
    message = client.messages.create(**forced)
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert (call.type, call.name, list(call.input)) == ("tool_use", "get_weather", ["city"])
    with pool.http() as http:
        events = checked(http.post("/v1/messages", json={**forced, "stream": True}).text)
    parts = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert list(json.loads("".join(parts))) == ["city"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    turns = [asked, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**{**body, "messages": turns, "tool_choice": {"type": "none"}}).content


def test_tokens_stops_and_prefills(client: anthropic.Anthropic):
    prompt: dict[str, Any] = {"model": "small", "system": "You are brief.", "messages": HI}
    counted = client.messages.count_tokens(**prompt, tools=[TOOL]).input_tokens
    usage = client.messages.create(**prompt, tools=[TOOL], max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert client.messages.count_tokens(**prompt).input_tokens < counted
    ask = {"role": "user", "content": "Count from 1 to 9 with commas."}
    begun = [ask, {"role": "assistant", "content": "1, 2, 3, 4, "}]
    # Claude Code always asks for more tokens than this context has.
    message = client.messages.create(
        model="small",
        max_tokens=32_000,
        messages=begun,
        stop_sequences=["7"],
        extra_body={"temperature": 0},
        timeout=60,
    )
    assert message.content[0].text.startswith("5, 6")
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "7")


def test_two_conversations_of_claude_code_share_their_prompt(client: anthropic.Anthropic):
    """Only the hash in the billing block and the last message differ."""
    rules = "\n".join(f"{index}. Read a file before you change it, and say in one line why." for index in range(30))

    def conversation(number: int) -> dict[str, Any]:
        blocks = [
            f"x-anthropic-billing-header: cc_version=2.1.4; cc_entrypoint=cli; cch={number:05x};",
            "You are Claude Code, Anthropic's official CLI for Claude.",
            rules,
        ]
        return {
            "model": "small",
            "system": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in blocks],
            "tools": [TOOL],
        }

    def said(number: int, last: str) -> dict[str, Any]:
        return {**conversation(number), "messages": [{"role": "user", "content": last}]}

    first = client.messages.create(**said(0xAB12, "List the files."), max_tokens=4)
    assert first.usage.input_tokens + first.usage.cache_read_input_tokens > 500
    second = client.messages.create(**said(0x9F03, "Mend the test."), max_tokens=4)
    common = client.messages.count_tokens(**said(1, "")).input_tokens
    assert second.usage.cache_read_input_tokens >= 0.95 * common


def test_a_stream_that_waits_for_its_model_begins_with_the_events_of_its_family(pool: Pool):
    """How long it may be silent is looked at for all families together (`test_responses.py`)."""
    before = pool.ledger()["submitted"]

    def read(path: str, **fields: Any) -> str:
        body = {"model": "late", "messages": HI, "stream": True, **fields}
        return httpx.post(pool.url + path, json=body, timeout=60).text

    with ThreadPoolExecutor() as threads:
        messages = threads.submit(read, "/v1/messages", max_tokens=3)
        ollama = threads.submit(read, "/api/chat")
        text, lines = messages.result(), [json.loads(line) for line in ollama.result().splitlines()]
    events = checked(text)
    assert [event["type"] for event in events][:3] == ["message_start", "ping", "content_block_start"]
    assert events[-1]["type"] == "message_stop"
    assert ": loading model=late" in text
    assert (lines[0]["message"]["content"], lines[0]["done"]) == ("", False)
    assert (lines[-2]["message"]["content"], lines[-1]["done"]) == ("late:2 ", True)
    assert lines[-1]["load_duration"] > 5e9
    assert pool.ledger()["submitted"] == before + 2
