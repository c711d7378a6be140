"""Whatever passes a schema can be translated: the two never disagree on what a field may be."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.errors import PoolError
from deployments.engines.chat.request import chat_options, completion_options
from deployments.engines.chat.tools import tool_plan
from deployments.schemas import ChatRequest, CompletionRequest, InferenceRequest

SCALARS = st.none() | st.booleans() | st.integers(-3, 200) | st.floats(-3, 3) | st.sampled_from(["", "x", "auto", "7"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "json_schema", "schema", "include_usage", "function", "5"]), inner)
    ),
    max_leaves=6,
)
FORMATS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema", "yaml"])},
    optional={"schema": VALUES, "json_schema": st.fixed_dictionaries({}, optional={"schema": VALUES})},
)


def bodies(schema: type[InferenceRequest]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies with a few fields of the schema, of any shape."""
    fields = st.dictionaries(st.sampled_from([*schema.model_fields, "suffix", "modalities"]), VALUES, max_size=4)
    formats = st.fixed_dictionaries({}, optional={"response_format": FORMATS})
    return st.builds(lambda one, other: {**one, **other}, fields, formats)


@settings(deadline=None, max_examples=300)
@given(bodies(ChatRequest))
def test_chat(fields: dict[str, Any]) -> None:
    body = {**fields, "messages": [{"role": "user", "content": "x"}]}
    with contextlib.suppress(ValidationError, PoolError):
        ChatRequest.model_validate(body)
        chat_options(body)
        tool_plan(body)


@settings(deadline=None, max_examples=300)
@given(bodies(CompletionRequest))
def test_completions(fields: dict[str, Any]) -> None:
    body = {**fields, "prompt": "x"}
    with contextlib.suppress(ValidationError, PoolError):
        CompletionRequest.model_validate(body)
        completion_options(body)
