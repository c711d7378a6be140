"""Tokens: what a text is to the model, and the reverse, without an answer to it."""

from __future__ import annotations

import json
from typing import Any

from deployments.engines.chat.prepare import Preparer
from deployments.engines.protocol import Call
from deployments.schemas import TOKENIZE


def tokens_body(preparer: Preparer, call: Call) -> bytes:
    """The answer to `/tokenize` or `/detokenize`, with the members of llama-server's and of vLLM's. Blocks."""
    body = call.json
    if call.path != TOKENIZE:
        text = preparer.text(body["tokens"])
        return json.dumps({"content": text, "prompt": text}).encode()
    tokens = preparer.tokens(body)
    shown: list[Any] = list(tokens)
    if body.get("with_pieces"):
        shown = [{"id": token, "piece": preparer.piece(token)} for token in tokens]
    return json.dumps({"tokens": shown, "count": len(tokens), "max_model_len": preparer.context_length}).encode()
