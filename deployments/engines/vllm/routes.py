"""The routes of vLLM's serving that clients may call; its others are its operator's. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import VllmModel
from deployments.schemas import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, PATHS, TOKENIZE

GENERATES = frozenset({CHAT, COMPLETIONS})
TOKENS = frozenset({TOKENIZE, DETOKENIZE})
AUDIO = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
POOLS = frozenset({EMBEDDINGS, "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"})
#: Of all models together.
ROUTES = PATHS | AUDIO | POOLS


def offered(model: VllmModel) -> frozenset[str]:
    """What a model offers by its configuration, loaded or not."""
    return TOKENS | (GENERATES if model.type == "llm" else POOLS)


def routes_of(tasks: Iterable[str]) -> frozenset[str]:
    """What a loaded model offers, by the tasks that vLLM names for it."""
    found = TOKENS
    for task in tasks:
        match task:
            case "generate":
                found |= GENERATES
            case "transcription":
                found |= AUDIO
            case "realtime":
                pass
            case _:
                found |= POOLS
    return found
