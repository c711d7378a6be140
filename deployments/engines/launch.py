"""The command of a model's server: the presets, what their macros stand for, and the bounds that stand on every line.

Pure: what is here starts nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template

from cluster.config import LaunchedModel, ServerModel, SglangModel

_LOOPBACK = ("--host", "127.0.0.1", "--port", "${PORT}")
SGLANG = (
    *("${PYTHON}", "-m", "sglang.launch_server", "--model-path", "${MODEL_PATH}"),
    *("--served-model-name", "${MODEL_ID}", *_LOOPBACK),
)
#: What lets SGLang give its devices back and have its weights again (level 1).
SGLANG_SLEEPS = ("--enable-memory-saver", "--enable-weights-cpu-backup")
PRESETS = {
    "vllm": (
        *("vllm", "serve", "${MODEL_PATH}", "--served-model-name", "${MODEL_ID}", *_LOOPBACK),
        *("--max-num-seqs", "${SLOTS}"),
    ),
    "llama_server": (
        *("llama-server", "--model", "${MODEL_PATH}", "--alias", "${MODEL_ID}", *_LOOPBACK),
        *("--parallel", "${SLOTS}"),
    ),
}
READY_PATH = "/health"


@dataclass(frozen=True, slots=True)
class Launch:
    """A command with its arguments, what is laid over its environment, and the path that says when it serves."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready_path: str


def launch_of(model_id: str, model: LaunchedModel, path: str, port: int) -> Launch:
    """How the server of a model whose file or folder lies at `path` is started, to listen on a port of this machine."""
    assert isinstance(model, ServerModel | SglangModel), "there are no others"
    given = model.engine_kwargs
    macros = {
        "PORT": str(port),
        "MODEL_PATH": path,
        "MODEL_ID": model_id,
        "SLOTS": str(model.slots),
        "PYTHON": model.python or sys.executable,
    }
    words = (*_command(model), *given.args, *_bounds(model))
    return Launch(
        tuple(Template(word).substitute(macros) for word in words),
        {name: Template(value).substitute(macros) for name, value in given.env.items()},
        given.ready_path or READY_PATH,
    )


def _command(model: ServerModel | SglangModel) -> tuple[str, ...]:
    if isinstance(model, SglangModel):
        return (*SGLANG, *(SGLANG_SLEEPS if model.sleep_level != 2 else ()))
    return PRESETS[model.engine_kwargs.preset] if model.engine_kwargs.preset else model.engine_kwargs.command


def _bounds(model: ServerModel | SglangModel) -> tuple[str, ...]:
    """Last, where no other argument can loosen them."""
    if not isinstance(model, SglangModel):
        return ()
    tokens = model.sglang_max_total_tokens
    running = ("--max-running-requests", str(model.slots))
    return (*running, "--max-total-tokens", str(tokens)) if tokens else running
