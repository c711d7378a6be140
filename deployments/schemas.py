"""The OpenAI family's request bodies: one Pydantic schema for each route, which is where every bound stands.

A body is checked once, here, before a lease is asked for; engines only translate what has passed and refuse what they
cannot honour. Fields without an entry go through unchecked: an engine or an external server may know them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"

PRIORITIES = {"high": 1, "medium": 2, "low": 3, "1": 1, "2": 2, "3": 3}
#: The pool's own fields, which no engine sees.
EXTENSIONS = ("priority", "keep_alive", "allow_remote", "timeout_s")

MAX_CHOICES = 128
MAX_PROMPTS = 2048
#: Of one request, over all its prompts.
MAX_SEQUENCES = 4096
MAX_STOPS = 16
MAX_LOGPROBS = 20

Penalty = Annotated[float, Field(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Field(ge=0, le=4)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]


class Part(BaseModel):
    """What all parts of a body have in common: JSON's own types, and unknown fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(Part):
    include_usage: bool | None = None


class PoolRequest(Part):
    """What every request to a model has: the model, and the pool's own fields."""

    model: str | None = None
    priority: int | None = None
    keep_alive: Annotated[float, Field(ge=-1)] | None = None
    allow_remote: bool | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @field_validator("priority", mode="before")
    @classmethod
    def _class_of(cls, value: Any) -> int | None:
        return None if value is None else parse_priority(value)

    @property
    def sequences(self) -> int:
        """How many sequences an engine runs for the body."""
        return 1


class InferenceRequest(PoolRequest):
    """What chat and completions share. `top_k` 0 and -1 both mean that it is off.

    With `clamp_max_tokens` the tokens that are asked for are a bound, and no reason to refuse a prompt that leaves
    less room: the families whose clients always send a large one ask for it.
    """

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Choices | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepeatPenalty | None = None
    repeat_penalty: RepeatPenalty | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    response_format: dict[str, Any] | None = None
    grammar: str | None = None
    ignore_eos: bool | None = None
    clamp_max_tokens: bool | None = None

    @field_validator("response_format")
    @classmethod
    def _format(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value.get("type"), str):
            raise ValueError("must have a type")
        inner = value.get("json_schema")
        described = isinstance(inner, dict) and isinstance(inner.get("schema"), dict)
        if value["type"] == "json_schema" and not described:
            raise ValueError("json_schema.schema is missing")
        return value

    @property
    def prompts(self) -> int:
        """How many prompts the body has."""
        return 1

    @property
    def sequences(self) -> int:
        """How many sequences an engine runs for the body: the choices of all its prompts."""
        return (self.n or 1) * self.prompts


class ChatRequest(InferenceRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value


class CompletionRequest(InferenceRequest):
    """`max_tokens: 0` only scores the prompt (`echo` with `logprobs`)."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: TopLogprobs | None = None
    best_of: Choices | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> int:
        return len(prompts_of(self.prompt))


Prompts = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class EmbeddingRequest(PoolRequest):
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    @property
    def sequences(self) -> int:
        return len(prompts_of(self.input))


class TokenizeRequest(PoolRequest):
    """Text, or a chat as its model would see it; llama-server calls the text `content`, vLLM `prompt`."""

    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if sum(each is not None for each in (self.content, self.prompt, self.messages)) != 1:
            raise ValueError("exactly one of content, prompt and messages is needed")
        return self


class DetokenizeRequest(PoolRequest):
    tokens: list[TokenId]


SCHEMAS: dict[str, type[PoolRequest]] = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
    EMBEDDINGS: EmbeddingRequest,
    TOKENIZE: TokenizeRequest,
    DETOKENIZE: DetokenizeRequest,
}
#: What every engine that runs in the pool's own processes serves.
PATHS = frozenset(SCHEMAS)
#: What servers with an OpenAI interface serve; whatever else they have is reached by the catch-all proxy.
SERVED = frozenset({CHAT, COMPLETIONS, EMBEDDINGS})


def prompts_of(given: str | list[Any]) -> list[Any]:
    """The prompts that a body has: one text, the tokens of one, or a list of either."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def parse_priority(value: Any) -> int:
    """1, 2 or 3 from `high|medium|low` in any case or the numbers themselves. Raises `ValueError`."""
    key = str(value).lower()
    if isinstance(value, bool) or key not in PRIORITIES:
        raise ValueError("must be high, medium or low, or 1, 2 or 3")
    return PRIORITIES[key]
