"""Models that are found as files: which of a folder's files are models, what they are called, and what they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

#: The first part of a model in several files, and the others, which belong to it.
_FIRST_PART = re.compile(r"-00001-of-\d{5}$")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}$")


def models_in(folder: Path, gpus: int | None) -> dict[str, Any]:
    """The models of a folder and of those below it, or of one file, by their ids. Raises `ConfigError` without any.

    None is loaded before somebody asks for it. `gpus` is how many this machine is said to have; None looks.
    """
    place = folder.expanduser().resolve()
    files = [place] if place.is_file() else sorted(each for each in place.rglob("*.gguf") if is_model(each))
    if not files:
        raise ConfigError(f"{folder}: there is no GGUF file")
    share = 1 if (count_gpus() if gpus is None else gpus) else 0
    models: dict[str, Any] = {}
    for file in files:
        models[free_id(id_of(file), models)] = {"model_path": str(file), "num_gpus": share}
    return models


def is_model(file: Path) -> bool:
    """Whether a GGUF file is a model by itself: no later part of one, and no projector of images."""
    return not (_LATER_PART.search(file.stem) or file.name.lower().startswith("mmproj"))


def id_of(file: Path) -> str:
    """What a model's file would be called in a configuration: `qwen3-8b-q4_k_m`."""
    name = _FIRST_PART.sub("", file.stem).lower()
    return re.sub(r"[^a-z0-9._-]+", "-", name).strip("-.") or "model"


def free_id(wanted: str, taken: dict[str, Any]) -> str:
    """The id, or with a number behind it where another model has it already."""
    number, free = 2, wanted
    while free in taken:
        free, number = f"{wanted}-{number}", number + 1
    return free


def count_gpus() -> int:
    """How many GPUs the driver of this machine knows."""
    from cluster.gpus import read_gpus

    return len(read_gpus()[0])
