"""What an importer reads and writes: a foreign file that knows its lines, and the pool's configuration as it grows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cluster.config import ConfigError

Key = tuple[str | int, ...]


class Note(NamedTuple):
    """What became of something in a line: it is not carried over, or means something else here."""

    line: int
    key: str
    message: str


class Source:
    """A foreign file: its text, and of YAML the values and the line in which each of them begins."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` where the file cannot be read."""
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path.name}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        self._lines: dict[Key, int] = {}
        self._ends: dict[Key, int] = {}

    def mapping(self) -> dict[str, Any]:
        """The file as YAML that holds a mapping. Raises `ConfigError`."""
        try:
            node = yaml.compose(self.text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}: " if mark else ""
            raise ConfigError(f"{self.path.name}: {where}not YAML") from None
        if not isinstance(data, dict) or node is None:
            raise ConfigError(f"{self.path.name}: expected a mapping at the top")
        self._locate(node, ())
        return data

    def line(self, *key: str | int) -> int:
        """The line of a value, or of the nearest one around it."""
        while key and key not in self._lines:
            key = key[:-1]
        return self._lines.get(key, 1)

    def line_with(self, text: str, *key: str | int) -> int:
        """The line of a value in which a text stands, or else the one in which the value begins."""
        first = self.line(*key)
        lines = self.text.splitlines()[first - 1 : self._ends.get(key, first)]
        return next((first + index for index, line in enumerate(lines) if text in line), first)

    def _locate(self, node: yaml.Node, key: Key) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                inner = (*key, str(name.value))
                self._lines[inner] = name.start_mark.line + 1
                self._ends[inner] = value.end_mark.line + 1
                self._locate(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                inner = (*key, index)
                self._lines[inner] = value.start_mark.line + 1
                self._locate(value, inner)


@dataclass
class Draft:
    """The pool's configuration as far as it has come, and what must be said about it."""

    source: Source
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    servers: list[dict[str, Any]] = field(default_factory=list)
    pool: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def note(self, key: Key, message: str) -> None:
        """Say something about a key of the file."""
        self.notes.append(Note(self.source.line(*key), ".".join(map(str, key)), message))

    def note_at(self, line: int, key: str, message: str) -> None:
        """Say something about a line of the file."""
        self.notes.append(Note(line, key, message))

    def drop(self, key: Key, given: Mapping[str, Any], known: Mapping[str, str], taken: frozenset[str]) -> None:
        """Say of every key of a mapping that was not taken why it is left behind."""
        for name in given:
            if name not in taken:
                self.note((*key, str(name)), known.get(str(name), "not carried over: Slotpool has nothing like it"))

    def add_server(self, server: dict[str, Any]) -> None:
        """One more external server, unless it stands there already."""
        if all(each["url"] != server["url"] for each in self.servers):
            self.servers.append(server)

    def document(self) -> dict[str, Any]:
        """The configuration; parts that are empty are left out."""
        parts = {"models": self.models, "servers": self.servers, **self.pool}
        return {name: value for name, value in parts.items() if value not in ({}, [], None)}


def mapping(value: Any) -> dict[str, Any]:
    """A value where it is a mapping, else an empty one: foreign files may hold anything."""
    return value if isinstance(value, dict) else {}


def hashed(key: str) -> str:
    """An API key as the pool's configuration may hold it in public."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def variable_for(name: str) -> str:
    """The name of an environment variable for the key of something called `name`."""
    return re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_") + "_API_KEY"
