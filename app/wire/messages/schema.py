"""The body of `/v1/messages`, checked before anything is made of it. Bounds are those of Anthropic's API.

Content blocks are checked by what reads them (`blocks.py`); fields without an entry are taken and left alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.schemas import MAX_STOPS

Block = dict[str, Any]


class Part(BaseModel):
    """JSON's own types; what is not known here is kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class Message(Part):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Part):
    """`type` is absent or `custom` for a tool of the client's own; any other names one of Anthropic's."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Part):
    type: str
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class OutputFormat(Part):
    type: str
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class OutputConfig(Part):
    effort: str | None = None
    format: OutputFormat | None = None


class Prompt(Part):
    """All that makes the prompt: the body of `count_tokens`."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


class MessagesRequest(Prompt):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
