"""Log-probabilities of tokens, in the chat shape and in the older completions shape of the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's bytes with its log-probability and the likeliest tokens at its place, most likely first.

    `logprob` is None for the first token of an echoed prompt, which nothing predicted.
    """

    piece: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` member of a chat choice."""
    return {
        "content": [
            {**_entry(token.piece, token.logprob), "top_logprobs": [_entry(*pair) for pair in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The `logprobs` member of a completions choice; `offset` is where its text starts in the whole answer."""
    texts = [_text(token.piece) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {_text(piece): value for piece, value in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def _entry(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def top_logprobs(logits: npt.NDArray[np.float32], token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of `token` and the `count` likeliest tokens, under the model's scores at temperature 1."""
    peak = float(logits.max())
    total = peak + math.log(float(np.exp(logits - peak, dtype=np.float32).sum(dtype=np.float64)))
    best: list[tuple[int, float]] = []
    if count:
        likeliest = np.argpartition(logits, -count)[-count:]
        likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
        best = [(int(index), float(logits[index]) - total) for index in likeliest]
    return float(logits[token]) - total, best
