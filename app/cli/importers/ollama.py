"""Ollama's Modelfile: where the weights come from, and how the model is to be run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app.cli.found import id_of
from app.cli.importers.draft import Draft, Source
from cluster.config import ConfigError

#: Where Ollama keeps what it has pulled, by its own rule and by its packages'.
STORES = ("~/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/models")
MODEL_LAYER = "application/vnd.ollama.image.model"
SERVER = {"url": "http://127.0.0.1:11434", "server_type": "ollama", "max_concurrent": 1}
#: Parameters that every request carries itself.
SAMPLING = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "num_predict", "stop", "num_keep", "repeat_last_n")
) | {"repeat_penalty", "presence_penalty", "frequency_penalty", "mirostat", "mirostat_eta", "mirostat_tau", "tfs_z"}
REASONS = {
    "TEMPLATE": "not carried over: the file's own chat template is used (prompt_format takes Jinja, this is Go's)",
    "SYSTEM": "not carried over: clients send it as the first message",
    "MESSAGE": "not carried over: clients send the conversation",
    "LICENSE": "not carried over: it stays with the model",
    "REQUIRES": "not needed: it is Ollama's version",
}


class Instruction(NamedTuple):
    """One instruction of a Modelfile with the line in which it begins."""

    line: int
    command: str
    value: str


def convert(source: Source) -> Draft:
    """The pool that serves what this Modelfile describes. Raises `ConfigError` where it is none."""
    draft = Draft(source)
    instructions = list(instructions_of(source.text))
    origin = next((each for each in instructions if each.command == "FROM"), None)
    if origin is None:
        raise ConfigError(f"{source.path.name}: a Modelfile has a FROM")
    keys: dict[str, Any] = {"num_gpus": 1}
    path = _weights(source, origin)
    for each in instructions:
        if each.command == "PARAMETER":
            _parameter(draft, keys, each)
        elif each.command == "ADAPTER" and each.value.endswith(".gguf"):
            keys.setdefault("gguf_lora", []).append(_path(source, each.value))
        elif each.command == "ADAPTER":
            draft.note_at(each.line, "ADAPTER", "not carried over: adapters are GGUF files here")
        elif each.command in REASONS:
            draft.note_at(each.line, each.command, REASONS[each.command])
        elif each.command != "FROM":
            draft.note_at(each.line, each.command, "not carried over: no instruction of a Modelfile")
    if path is None:
        draft.note_at(origin.line, "FROM", f"the weights of {origin.value} are not here: Ollama itself serves it")
        draft.add_server(dict(SERVER))
        return draft
    draft.models[_name(source, origin)] = {"model_path": path, **keys}
    if "gguf_n_gpu_layers" not in keys and keys["num_gpus"]:
        draft.note_at(origin.line, "FROM", "taken to be on a GPU: num_gpus: 0 puts it on the CPU")
    return draft


def instructions_of(text: str) -> Iterator[Instruction]:
    """The instructions; a value in three quotation marks may have many lines."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        command, _, value = line.strip().partition(" ")
        value = value.strip()
        if not command or command.startswith("#"):
            continue
        quoted = value.find('"""')
        if quoted >= 0 and '"""' not in value[quoted + 3 :]:
            for _, more in lines:
                value += f"\n{more}"
                if '"""' in more:
                    break
        yield Instruction(number, command.upper(), value)


def _parameter(draft: Draft, keys: dict[str, Any], given: Instruction) -> None:
    name, _, value = given.value.partition(" ")
    name, value = name.lower(), value.strip().strip('"')
    where = f"PARAMETER {name}"
    if name in SAMPLING:
        draft.note_at(given.line, where, "not carried over: clients send it with each request")
    elif not re.fullmatch(r"-?\d+", value):
        draft.note_at(given.line, where, "not carried over: Slotpool has nothing like it")
    elif name == "num_ctx" and int(value) > 0:
        keys["gguf_n_ctx"] = int(value)
    elif name == "num_gpu":
        if int(value) == 0:
            keys["num_gpus"] = 0
        elif int(value) < 99:
            keys["gguf_n_gpu_layers"] = int(value)
    elif name == "num_thread" and int(value) > 0:
        keys.setdefault("engine_kwargs", {})["n_threads"] = int(value)
    elif name == "num_batch" and int(value) >= 32:
        keys.setdefault("engine_kwargs", {})["n_batch"] = int(value)
    else:
        draft.note_at(given.line, where, "not carried over: Slotpool has nothing like it")


def _weights(source: Source, origin: Instruction) -> str | None:
    """The file of the weights: the one that is named, or that of Ollama's own store."""
    value = origin.value.strip('"')
    if value.startswith(("/", "./", "../", "~")) or value.endswith(".gguf"):
        return _path(source, value)
    name, _, tag = value.partition(":")
    parts = name.split("/")
    host = parts.pop(0) if len(parts) > 2 else "registry.ollama.ai"
    owner = parts.pop(0) if len(parts) > 1 else "library"
    roots = (os.environ.get("OLLAMA_MODELS"), *STORES)
    for root in (Path(each).expanduser() for each in roots if each):
        found = _blob(root, root / "manifests" / host / owner / "/".join(parts) / (tag or "latest"))
        if found is not None:
            return found
    return None


def _path(source: Source, value: str) -> str:
    """A path in a Modelfile, which begins at the Modelfile's own folder."""
    return str((source.path.parent / Path(value.strip('"')).expanduser()).resolve())


def _blob(root: Path, manifest: Path) -> str | None:
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == MODEL_LAYER)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    blob = root / "blobs" / str(digest).replace(":", "-")
    return str(blob) if blob.is_file() else None


def _name(source: Source, origin: Instruction) -> str:
    """What the model is called: after its Modelfile, `coder.Modelfile`, or else after its weights."""
    stem = source.path.stem if source.path.suffix else ""
    value = origin.value.strip('"')
    return id_of(
        Path(stem or (value if value.endswith(".gguf") else value.replace(":", "-").replace("/", "-") + ".gguf"))
    )
