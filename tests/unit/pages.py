"""README, CONTRIBUTING, CHANGELOG and the pages in docs/, taken apart for the tests of what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cluster.config.reference import anchor

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code on a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    text = text_of(page)
    name = str(page.relative_to(ROOT))
    return [Block(name, text.count("\n", 0, each.start()) + 1, each[1], each[2]) for each in FENCE.finditer(text)]


ALL = [block for page in PAGES for block in blocks(page)]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text_of(page))


def spans(page: Path) -> list[str]:
    """What a page's prose has in code."""
    return [each.replace("\n", " ") for each in re.findall(r"`([^`]+)`", prose(page))]


def code(page: Path) -> list[str]:
    """Everything on a page that is code, line by line."""
    shown = [line for each in blocks(page) if each.language in ("", "sh") for line in each.text.splitlines()]
    return [*spans(page), *shown]


def anchors(page: Path) -> set[str]:
    return {anchor(each) for each in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def section(page: Path, fragment: str) -> str:
    """What stands below a heading, up to the next one of its level or a higher one."""
    text = text_of(page)
    for heading in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE):
        if anchor(heading[2]) == fragment:
            end = re.compile(rf"^#{{1,{len(heading[1])}}} ", re.MULTILINE).search(text, heading.end())
            return text[heading.end() : end.start() if end else None]
    raise AssertionError(f"{page.name} has no {fragment}")
