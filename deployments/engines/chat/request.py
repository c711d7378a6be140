"""From an OpenAI request body to what a token engine needs, with every field checked.

Two rules: a field of the wrong shape is a 400 that names it, and a field that would change the answer but that token
engines cannot honour is refused, never ignored. Fields that do not change the answer (`user`, `metadata`, the pool's
own extensions) are not looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.errors import InvalidRequest, UnsupportedParameter

#: Fields that change the answer and that no token engine here offers, with the values that mean "do nothing".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "suffix": (None, ""),
    "verbosity": (None, "medium"),
}
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20


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
    """Check a chat body. Raises `InvalidRequest` or `UnsupportedParameter`."""
    wanted = _boolean(body, "logprobs")
    top = _integer(body, "top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return _options(body, _integer(body, key, 1), (top or 0) if wanted else None)


def completion_options(body: Mapping[str, Any]) -> GenerationOptions:
    """Check a completions body; `max_tokens` defaults to 16 there, and `logprobs` is a number."""
    n = _integer(body, "n", 1, MAX_CHOICES) or 1
    if (_integer(body, "best_of", 1, MAX_CHOICES) or n) != n:
        raise UnsupportedParameter("best_of other than n is not supported", param="best_of")
    tokens = _integer(body, "max_tokens", 0)
    return _options(body, 16 if tokens is None else tokens, _integer(body, "logprobs", 0, MAX_LOGPROBS))


def _options(body: Mapping[str, Any], max_tokens: int | None, top_logprobs: int | None) -> GenerationOptions:
    for name, harmless in _UNSUPPORTED.items():
        if name in body and body[name] not in harmless:
            raise UnsupportedParameter(f"{name} is not supported by this engine", param=name)
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    return GenerationOptions(
        sampling=_sampling(body),
        max_tokens=max_tokens,
        n=_integer(body, "n", 1, MAX_CHOICES) or 1,
        stops=_stops(body.get("stop")),
        top_logprobs=top_logprobs,
        response_format=_response_format(body.get("response_format")),
        include_usage=bool(stream_options.get("include_usage")),
        ignore_eos=_boolean(body, "ignore_eos"),
    )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    repeat = "repetition_penalty" if body.get("repetition_penalty") is not None else "repeat_penalty"
    top_k = _integer(body, "top_k", -1)
    return Sampling(
        temperature=_number(body, "temperature", 0.0, 2.0, 1.0),
        top_k=max(0, top_k or 0),
        top_p=_number(body, "top_p", 0.0, 1.0, 1.0),
        min_p=_number(body, "min_p", 0.0, 1.0, 0.0),
        repeat_penalty=_number(body, repeat, 0.0, 4.0, 1.0),
        frequency_penalty=_number(body, "frequency_penalty", -2.0, 2.0, 0.0),
        presence_penalty=_number(body, "presence_penalty", -2.0, 2.0, 0.0),
        seed=_integer(body, "seed"),
        logit_bias=_logit_bias(body.get("logit_bias")),
    )


def _number(body: Mapping[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be a number between {least:g} and {most:g}", param=name)
    return float(value)


def _integer(body: Mapping[str, Any], name: str, least: int | None = None, most: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer", param=name)
    if least is not None and value < least:
        raise InvalidRequest(f"{name} must be at least {least}", param=name)
    if most is not None and value > most:
        raise InvalidRequest(f"{name} must be at most {most}", param=name)
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return bool(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops) or len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop must be a string or a list of at most {MAX_STOPS} strings", param="stop")
    return tuple(stop for stop in stops if stop)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise InvalidRequest("logit_bias must be an object of token ids and numbers", param="logit_bias")
    bias = []
    for key, amount in value.items():
        text = str(key)
        if not text.isdecimal() or isinstance(amount, bool) or not isinstance(amount, int | float):
            raise InvalidRequest("logit_bias must be an object of token ids and numbers", param="logit_bias")
        if not -100 <= amount <= 100:
            raise InvalidRequest("logit_bias values must lie between -100 and 100", param="logit_bias")
        bias.append((int(text), float(amount)))
    return tuple(sorted(bias))


def _response_format(value: Any) -> ResponseFormat:
    if value is None:
        return ResponseFormat()
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return ResponseFormat()
    if kind == "json_object":
        # llama-server's and llama-cpp-python's clients put a schema here.
        schema = value.get("schema")
        return ResponseFormat("json_schema", schema) if isinstance(schema, Mapping) else ResponseFormat("json_object")
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            raise InvalidRequest("response_format.json_schema.schema is missing", param="response_format")
        return ResponseFormat("json_schema", schema)
    raise UnsupportedParameter(f"response_format of type {kind!r} is not supported", param="response_format")
