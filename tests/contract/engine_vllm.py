"""vLLM on the CPU with SmolLM2, in an environment of its own: the model's `python` names its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.contract.entry import Entry
from tests.contract.pool import SLOTS
from tests.hf_weights import VLLM_PYTHON, has_vllm, smollm2_folder

#: Tokens of one step, which nothing interrupts; while it runs the next one is already made up.
STEP = 256
#: Small, so that it loads soon: no graph is compiled, and the KV cache is enough for the slots.
SMALL: dict[str, Any] = {
    "max_model_len": 1024,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_batched_tokens": STEP,
}


def vllm(path: Path, engine_kwargs: dict[str, Any] = SMALL, **fields: Any) -> dict[str, Any]:
    """A model of vLLM's."""
    model = {"backend": "vllm", "python": str(VLLM_PYTHON), "model_path": str(path), "target_inflight": SLOTS}
    return {**model, "engine_kwargs": engine_kwargs, **fields}


class Library:
    """vLLM without a server, in a process of its own."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("vllm_library.py")
        command = [str(VLLM_PYTHON), str(program), str(smollm2_folder()), json.dumps(SMALL)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def count(self, text: str) -> int:
        return int(self._ask("count", text))

    def count_chat(self, messages: list[dict[str, Any]]) -> int:
        return int(self._ask("count_chat", messages))

    def greedy(self, prompt: str, tokens: int) -> str:
        return str(self._ask("greedy", prompt, tokens))

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, *what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@asynccontextmanager
async def library(folder: Path) -> AsyncGenerator[Library, None]:
    opened = Library()
    yield opened
    opened.close()


def broken(folder: Path) -> dict[str, Any]:
    path = folder / "broken"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["NobodysModel"]}')
    return vllm(path)


VLLM = Entry("vllm", (), lambda folder: vllm(smollm2_folder()), broken, library, batch=2 * STEP, is_there=has_vllm)
