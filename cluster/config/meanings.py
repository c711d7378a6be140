"""What the keys of the configuration mean, in the words that stand above them in the source.

A key is described by the `#:` comment in front of it. Comments cost nothing when a process starts, which descriptions
in the schema itself would; only what writes the schema and the reference reads them.
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

MARK = "#:"


def meanings(schema: type[BaseModel]) -> dict[str, str]:
    """Each field's comment, by the field's name; a base class describes what it brings."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _own(base)
    return {name: text for name, text in found.items() if name in schema.model_fields}


def parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schemas that an annotation mentions, each with those of its own fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from parts(field.annotation)
    for argument in typing.get_args(annotation):
        yield from parts(argument)


def _own(schema: type[BaseModel]) -> dict[str, str]:
    lines, _ = inspect.getsourcelines(schema)
    (node,) = ast.parse("".join(lines)).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            found[each.target.id] = _comment(lines, each.lineno - 1)
    return {name: text for name, text in found.items() if text}


def _comment(lines: list[str], line: int) -> str:
    """The comment that ends above a line."""
    words: list[str] = []
    while line and (text := lines[line - 1].strip()).startswith(MARK):
        words.insert(0, text.removeprefix(MARK).strip())
        line -= 1
    return " ".join(words)
