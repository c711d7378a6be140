"""From an OpenAI request body to what a token engine needs.

The body has passed its schema (`deployments/schemas.py`), where all bounds stand; this only translates. A field that
would change the answer but that token engines cannot honour is refused, never ignored. Fields that do not change the
answer (`user`, `metadata`) are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.errors import UnsupportedParameter

#: Fields that change the answer and that no engine here offers, with the values that mean "do nothing".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "verbosity": (None, "medium"),
}
#: A token engine has no text behind the answer, either.
_UNSUPPORTED = {**UNSUPPORTED, "suffix": (None, "")}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults are those of the OpenAI API; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def for_copy(self, copy: int) -> Sampling:
        """The sampling of one of `n` choices: a seed gives every choice its own, reproducible numbers."""
        return self if self.seed is None or copy == 0 else replace(self, seed=self.seed + copy)

    @property
    def greedy(self) -> bool:
        return self.temperature <= 0.0 or self.top_k == 1

    @property
    def reshapes(self) -> bool:
        """Whether anything but the temperature moves the scores, so that even greedy is not plainly the maximum."""
        return bool(
            self.logit_bias or self.frequency_penalty or self.presence_penalty or self.repeat_penalty not in (0.0, 1.0)
        )


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """`response_format`: plain text, any JSON object, or JSON of one schema."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What a request says about the generation, apart from its prompt."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()
    #: None = no logprobs; otherwise how many alternatives to list for each token.
    top_logprobs: int | None = None
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    include_usage: bool = False
    ignore_eos: bool = False


def chat_options(body: Mapping[str, Any]) -> GenerationOptions:
    """Translate a chat body. Raises `UnsupportedParameter`."""
    tokens = body.get("max_completion_tokens") or body.get("max_tokens")
    return _options(body, tokens, (body.get("top_logprobs") or 0) if body.get("logprobs") else None)


def completion_options(body: Mapping[str, Any]) -> GenerationOptions:
    """Translate a completions body; `max_tokens` defaults to 16 there, and `logprobs` is a number.

    With `clamp_max_tokens` the default is what fits, as in chat.
    """
    n = body.get("n") or 1
    if (body.get("best_of") or n) != n:
        raise UnsupportedParameter("best_of other than n is not supported", param="best_of")
    tokens = body.get("max_tokens")
    default = None if body.get("clamp_max_tokens") else 16
    return _options(body, default if tokens is None else tokens, body.get("logprobs"))


def refuse(body: Mapping[str, Any], fields: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `UnsupportedParameter` for a field that would do something; `fields` have the values that do nothing."""
    for name, harmless in fields.items():
        if name in body and body[name] not in harmless:
            raise UnsupportedParameter(f"{name} is not supported by this engine", param=name)


def _options(body: Mapping[str, Any], max_tokens: int | None, top_logprobs: int | None) -> GenerationOptions:
    refuse(body, _UNSUPPORTED)
    stop = body.get("stop") or ()
    return GenerationOptions(
        sampling=_sampling(body),
        max_tokens=max_tokens,
        n=body.get("n") or 1,
        stops=(stop,) if isinstance(stop, str) else tuple(each for each in stop if each),
        top_logprobs=top_logprobs,
        response_format=_response_format(body.get("response_format")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        ignore_eos=bool(body.get("ignore_eos")),
    )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    repeat = "repetition_penalty" if body.get("repetition_penalty") is not None else "repeat_penalty"
    bias = body.get("logit_bias") or {}
    return Sampling(
        temperature=_number(body, "temperature", 1.0),
        # 0 and -1 both mean that it is off.
        top_k=max(0, body.get("top_k") or 0),
        top_p=_number(body, "top_p", 1.0),
        min_p=_number(body, "min_p", 0.0),
        repeat_penalty=_number(body, repeat, 1.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0),
        presence_penalty=_number(body, "presence_penalty", 0.0),
        seed=body.get("seed"),
        logit_bias=tuple(sorted((int(token), float(amount)) for token, amount in bias.items())),
    )


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    return default if value is None else float(value)


def _response_format(value: Mapping[str, Any] | None) -> ResponseFormat:
    kind = "text" if value is None else value["type"]
    if value is None or kind == "text":
        return ResponseFormat()
    if kind == "json_object":
        # llama-server's and llama-cpp-python's clients put a schema here.
        schema = value.get("schema")
        return ResponseFormat("json_schema", schema) if isinstance(schema, Mapping) else ResponseFormat("json_object")
    if kind == "json_schema":
        return ResponseFormat("json_schema", value["json_schema"]["schema"])
    raise UnsupportedParameter(f"response_format of type {kind!r} is not supported", param="response_format")
