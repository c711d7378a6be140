"""Whatever a client sends: the families' adapters take it or refuse it, and never fail over it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.wire.messages.adapter import MessagesAdapter
from app.wire.ollama.adapter import OllamaAdapter
from cluster.errors import InvalidRequest
from deployments.run_info import RunInfo
from tests.unit.family_words import KINDS, MEMBERS

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4),
    max_leaves=12,
)
BODIES = st.fixed_dictionaries({"model": st.just("m")}, optional=dict.fromkeys(MEMBERS, JSON))
BLOCKS = st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=4).flatmap(
    lambda block: st.sampled_from(KINDS).map(lambda kind: {**block, "type": kind})
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "content": st.lists(BLOCKS, max_size=3) | JSON,
        },
        optional={"tool_calls": JSON, "images": JSON, "tool_name": JSON},
    ),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(BODIES, MESSAGES)
def test_any_body_is_taken_or_refused(body: dict[str, Any], messages: list[dict[str, Any]]):
    for asked in (body, {"model": "m", "max_tokens": 1, **body, "messages": messages}):
        for build in (
            lambda asked=asked: MessagesAdapter(asked, "r"),
            lambda asked=asked: OllamaAdapter(asked),
            lambda asked=asked: OllamaAdapter(asked, generates=True),
        ):
            with contextlib.suppress(InvalidRequest):
                adapter = build()
                json.dumps(adapter.chat)
                assert all(isinstance(name, str) for name in adapter.ignored)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["content", "reasoning_content"]), st.text(max_size=4)), max_size=6))
def test_a_streams_text_is_all_there(deltas: list[dict[str, Any]]):
    said = "".join(delta.get("content", "") for delta in deltas)
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    for adapter in (MessagesAdapter(asked, "r"), OllamaAdapter(asked)):
        stream = b"".join(adapter.feed({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas)
        lines = (stream + adapter.end(RunInfo())).decode().split("\n")
        datas = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith(("data: ", "{"))]
        texts = [data.get("delta", {}).get("text") or data.get("message", {}).get("content") for data in datas]
        assert "".join(filter(None, texts)) == said
