"""The bodies of Ollama's routes, checked before anything is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.schemas import MAX_LOGPROBS, MAX_STOPS, Penalty, RepeatPenalty


class Part(BaseModel):
    """JSON's own types; what is not known here is kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class Options(BaseModel):
    """What is said of the sampling. Ollama takes numbers in whatever form they come; the defaults are its own.

    `num_predict` below 1 means that the model ends by itself, `seed` below 0 that each answer is another.
    """

    model_config = ConfigDict(extra="allow")

    num_predict: int = -1
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_k: int = 40
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repeat_penalty: RepeatPenalty = 1.1
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: int = -1
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None


class Function(Part):
    name: str
    arguments: dict[str, Any] | str | None = None


class ToolCall(Part):
    id: str | None = None
    function: Function


class Message(Part):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaRequest(Part):
    """What chat and generate share."""

    model: str | None = None
    stream: bool | None = None
    options: Options | None = None
    format: dict[str, Any] | Literal["", "json"] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class ChatRequest(OllamaRequest):
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(OllamaRequest):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class EmbedRequest(Part):
    """`prompt` is the text of the older `/api/embeddings`."""

    model: str | None = None
    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
