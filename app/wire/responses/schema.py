"""The body of `/v1/responses`, and of the pool dialect, which adds fields of its own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from cluster import errors
from deployments.requests import invalid
from deployments.schemas import EXTENSIONS, MAX_LOGPROBS, MAX_STOPS, Part

#: Fields of the pool dialect: one that is out of bounds is answered with 422, as its clients know it.
DIALECT = ("decoding", "source_lang_code", "target_lang_code")
#: Fields of chat completions that are taken as they are, so that nothing is lost to who comes from there.
PASSED = (
    *EXTENSIONS,
    "seed",
    "stop",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "repeat_penalty",
    "logit_bias",
    "grammar",
    "ignore_eos",
    "enable_thinking",
    "chat_template_kwargs",
)
#: State that only the hosted service has: an answer without it would be another one.
UNSUPPORTED = ("conversation", "prompt")

LangCode = Annotated[str, Field(pattern=r"^[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*$")]


class DecodingOptions(Part):
    """What the pool dialect says about the generation."""

    beam_size: Annotated[int, Field(ge=1, le=16)] | None = None
    top_k: Annotated[int, Field(ge=1, le=200)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None


class TextOptions(Part):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(Part):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Part):
    """Fields without an entry steer a hosted service and change no answer here: they are taken and not looked at."""

    input: str | list[dict[str, Any]] | None = None
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    decoding: DecodingOptions | None = None
    source_lang_code: LangCode | None = None
    target_lang_code: LangCode | None = None

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input as items, as the client sent them."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input or []

    @property
    def extras(self) -> dict[str, Any]:
        """Fields without an entry here."""
        return self.model_extra or {}


def check(body: dict[str, Any], *, is_flat: bool = False) -> ResponsesRequest:
    """The request of a body. Raises `InvalidRequest`: 422 in the dialect, else 400."""
    for name in UNSUPPORTED:
        if body.get(name) is not None:
            raise errors.UnsupportedParameter(f"{name} is not supported: there is no such state here", param=name)
    try:
        request = ResponsesRequest.model_validate(body)
    except ValidationError as error:
        refusal = invalid(error)
        if is_flat or (refusal.param or "").split(".")[0] in DIALECT:
            refusal.status = 422
        raise refusal from None
    if request.input is None and request.previous_response_id is None:
        raise errors.InvalidRequest("input: is missing", param="input", status=422 if is_flat else None)
    return request
