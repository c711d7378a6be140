"""Writes models into a YAML file by hand, so that what people wrote there stays as it is, comments included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from app.cli.output import Misuse

#: Comments stand below one another behind keys up to this length.
LONGEST_ALIGNED = 48


class Line(NamedTuple):
    """One key of a model, and what is to be said of it."""

    key: str
    value: Any
    comment: str = ""


def block(name: str, lines: Sequence[Line], indent: str = "  ") -> str:
    """A model as it stands below `models:`."""
    keys = [f"{indent * 2}{line.key}: {scalar(line.value)}" for line in lines]
    # A long path does not push the other comments out of sight.
    width = max((len(key) for key in keys if len(key) <= LONGEST_ALIGNED), default=0)
    rows = [
        f"{key.ljust(width)}  # {line.comment}" if line.comment else key for key, line in zip(keys, lines, strict=True)
    ]
    return "\n".join([f"{indent}{scalar(name)}:", *rows, ""])


def insert(text: str, name: str, lines: Sequence[Line]) -> str:
    """The text of a configuration with one more model behind `models:`. Raises `Misuse` where that cannot be."""
    found = re.search(r"^models:[ \t]*(#.*)?$", text, re.MULTILINE)
    if found is None:
        if re.search(r"^models\s*:", text, re.MULTILINE):
            raise Misuse("its models are written in one line: put them in lines of their own first")
        return f"{text.rstrip()}\n\nmodels:\n{block(name, lines)}".lstrip()
    rest = text[found.end() :]
    child = re.search(r"^([ \t]+)[^\s#]", rest, re.MULTILINE)
    changed = f"{text[: found.end()]}\n{block(name, lines, child[1] if child else '  ')}{rest.removeprefix(chr(10))}"
    if (yaml.safe_load(changed).get("models") or {}).get(name) is None:
        raise Misuse("it is written in a way that cannot be added to")
    return changed


def scalar(value: Any) -> str:
    """A value in one line of YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)).split("\n")[0]
