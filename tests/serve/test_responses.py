"""OpenAI's client over real Serve: Responses created, streamed, stored, continued and called with tools.

Also, in every family that streams: a model that takes longer to load than a client waits without an event.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.pool import Pool, fake, running_pool, smollm2
from tests.silence import FAMILIES, PATIENCE_S, longest_silence

OFFICIAL: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
    "strict": None,
}


class City(BaseModel):
    name: str
    is_large: bool


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    models = {
        "words": fake(tokens=5, tokens_per_s=10, ttft_s=0.05),
        "slow": fake(load_s=22, tokens=3, tokens_per_s=1000),
        "smol": smollm2(num_cpus=0, target_inflight=4),
    }
    with running_pool(port, {"models": models}) as pool:
        yield pool
        pool.check()


def test_a_response_is_created_retrieved_continued_and_deleted(pool: Pool):
    client = pool.openai()
    first = client.responses.create(model="words", input="x", instructions="Be brief.", metadata={"a": "b"})
    assert (first.status, first.output_text, first.metadata) == (
        "completed",
        "words:0 words:1 words:2 words:3 words:4 ",
        {"a": "b"},
    )
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    second = client.responses.create(model="words", input="y", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    listed = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in listed] == ["y"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="words", input="z", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id"


def test_a_stream_is_live_official_and_measured(pool: Pool):
    """The first delta comes before the engine has finished, and the times nest: pool, engine, backend."""
    client = pool.openai()
    client.responses.create(model="words", input="x")
    events, arrived = [], []
    for event in client.responses.create(model="words", input="x", stream=True):
        arrived.append(time.monotonic())
        events.append(event)
        if event.type != "response.metrics":
            OFFICIAL.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [at for event, at in zip(events, arrived, strict=True) if event.type == "response.output_text.delta"]
    assert len(deltas) == 5
    assert arrived[-1] - deltas[0] > 0.05
    metrics = events[-1].response.to_dict()["metrics"]
    assert metrics["pool_total_wall_ms"] >= metrics["engine_total_wall_ms"] >= 50
    with client.responses.stream(model="words", input="x") as stream:
        assert "".join(each.delta for each in stream if each.type == "response.output_text.delta").startswith("words:0")
        assert stream.get_final_response().output_text == "words:0 words:1 words:2 words:3 words:4 "


def test_a_real_model_measures_itself_counts_and_calls_a_tool(pool: Pool):
    client = pool.openai()
    answer = client.responses.create(
        model="smol",
        input="Add 2 and 3.",
        tools=[TOOL],
        tool_choice={"type": "function", "name": "add"},
        temperature=0,
        max_output_tokens=60,
    )
    call = answer.output[-1]
    assert (answer.status, call.type, call.name) == ("completed", "function_call", "add")
    assert set(json.loads(call.arguments)) == {"a", "b"}
    metrics = answer.to_dict()["metrics"]
    engine, backend = metrics["engine_total_wall_ms"], metrics["backend_inference_wall_ms"]
    assert metrics["pool_total_wall_ms"] >= engine >= backend > 0
    assert metrics["engine_output_tokens"] == answer.usage.output_tokens > 0
    streamed = list(
        client.responses.create(
            model="smol", input="Add 2 and 3.", tools=[TOOL], tool_choice="required", temperature=0, stream=True
        )
    )
    assert "response.function_call_arguments.delta" in {event.type for event in streamed}
    for event in streamed:
        if event.type != "response.metrics":
            OFFICIAL.validate_python(event.to_dict())
    again = client.responses.create(
        model="smol",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "5"}],
        previous_response_id=answer.id,
        tools=[TOOL],
        max_output_tokens=8,
    )
    assert again.usage.input_tokens > answer.usage.input_tokens
    count = client.responses.input_tokens.count(model="smol", input="Add 2 and 3.")
    plain = client.responses.create(model="smol", input="Add 2 and 3.", max_output_tokens=1)
    assert count.input_tokens == plain.usage.input_tokens
    assert (plain.status, plain.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_schema_is_kept_to(pool: Pool):
    parsed = pool.openai().responses.parse(
        model="smol", input="Describe Paris.", text_format=City, temperature=0, max_output_tokens=200
    )
    assert isinstance(parsed.output_parsed, City)


def test_the_dialect_lists_what_is_loaded_and_streams_flat(pool: Pool):
    pool.openai().responses.create(model="words", input="x")
    with pool.http() as http:
        assert "words" in http.get("/llm-pool/v1/models").json()["models"]
        assert "slow" not in http.get("/llm-pool/v1/models").json()["models"]
        body = {"model": "words", "input": "x", "stream": True, "decoding": {"max_tokens": 2, "beam_size": 2}}
        answer = http.post("/llm-pool/v1/responses", json=body)
    assert answer.headers["x-slotpool-ignored"] == "decoding.beam_size"
    assert answer.text.count("event: response.output_text.delta") == 2
    assert json.loads(answer.text.strip().rpartition("data: ")[2])["output_text"] == "words:0 words:1 "


def test_a_response_in_the_background_is_polled_and_cancelled(pool: Pool):
    client = pool.openai()
    response = client.responses.create(model="words", input="x", background=True)
    assert response.status == "queued"
    deadline = time.monotonic() + 20
    while client.responses.retrieve(response.id).status == "queued" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.responses.retrieve(response.id).output_text.startswith("words:0")
    endless = client.responses.create(
        model="words", input="x", background=True, max_output_tokens=5000, extra_body={"timeout_s": 60}
    )
    pool.wait(lambda ledger: ledger["leases"] == 1)
    assert client.responses.cancel(endless.id).status == "cancelled"
    pool.wait(lambda ledger: ledger["leases"] == 0, 5)
    assert client.responses.retrieve(endless.id).status == "cancelled"


async def test_a_stream_that_waits_for_a_long_load_is_never_silent_in_any_family(pool: Pool):
    """22 s of load: each client has an event in time, and behind each stands one request."""
    before = pool.ledger()["submitted"]
    told = dict(
        zip(
            FAMILIES, await asyncio.gather(*(longest_silence(pool.url, "slow", name) for name in FAMILIES)), strict=True
        )
    )
    for family, (longest, text) in told.items():
        assert longest < PATIENCE_S, family
        assert "slow:2" in text, family
    for family in ("chat", "responses"):
        assert ": loading model=slow" in told[family][1]
        assert "%" in told[family][1]
    assert pool.ledger()["submitted"] == before + len(FAMILIES)
