"""What the pages of clients and migrations show of other programs: tried lines, and the importers' own output."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from app.cli import cli
from app.cli.importers import IMPORTERS
from tests.agents.clients import CLIENTS, version_of
from tests.unit.pages import DOCS, Block, blocks, text_of

#: The pool and the model of the page of clients.
URL, MODEL = "http://127.0.0.1:8000", "coder"


@pytest.mark.parametrize(
    ("program", "file", "given", "shown", "written"),
    re.findall(
        r"<!-- import (\S+) (\S+) -->\n```\w*\n(.*?)^```$.*?^```\n(.*?)^```$.*?^```yaml\n(.*?)^```$",
        text_of(DOCS / "migration.md"),
        re.MULTILINE | re.DOTALL,
    ),
)
def test_the_importers_say_what_the_page_of_migrations_shows(
    program: str, file: str, given: str, shown: str, written: str, tmp_path: Path
):
    (tmp_path / file).write_text(given)
    result = CliRunner().invoke(cli, ["import", program, str(tmp_path / file)])
    assert result.stdout == written
    assert f"$ slotpool import {program} {file} > pool.yaml\n{result.stderr}" == shown


def lines_for(client: str) -> Block:
    """The first block for a client on its page."""
    text = text_of(DOCS / "clients.md")
    first = text.count("\n", 0, text.index(f"\n## {client}\n"))
    return next(each for each in blocks(DOCS / "clients.md") if each.line > first)


def tried(client: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """The command and the environment with which `make test-agents` tries a client; files are in `home`."""
    found = next(each for each in CLIENTS if each.name == client)
    return found.command(URL, MODEL, home), dict(found.environment(URL, MODEL, home))


def within(shown: Any, known: Any) -> bool:
    """Whether all that is shown is known, and the same. How many tokens are asked for is the fake engine's matter."""
    if isinstance(shown, dict):
        return isinstance(known, dict) and all(
            key == "output" or (key in known and within(value, known[key])) for key, value in shown.items()
        )
    if isinstance(shown, list):
        return isinstance(known, list) and len(shown) == len(known) and all(map(within, shown, known))
    return bool(shown == known)


@pytest.mark.parametrize(
    ("heading", "client", "file", "read"),
    [
        ("Codex", "codex", ".codex/config.toml", tomllib.loads),
        ("opencode", "opencode", "opencode.json", json.loads),
        ("Continue", "continue", "continue.yaml", yaml.safe_load),
        ("llm", "llm", "llm/extra-openai-models.yaml", yaml.safe_load),
    ],
)
def test_a_clients_file_is_the_one_that_it_was_tried_with(
    heading: str, client: str, file: str, read: Callable[[str], Any], tmp_path: Path
):
    tried(client, tmp_path)
    assert within(read(lines_for(heading).text), read((tmp_path / file).read_text()))


def test_claude_codes_lines_are_those_that_it_was_tried_with(tmp_path: Path):
    command, environment = tried("claude-code", tmp_path)
    *exports, last = lines_for("Claude Code").text.splitlines()
    assert within(dict(each.removeprefix("export ").split("=", 1) for each in exports), environment)
    assert last.split()[1:] == command[1:3]


def test_aiders_line_is_the_one_that_it_was_tried_with(tmp_path: Path):
    command, _ = tried("aider", tmp_path)
    words = lines_for("aider").text.split()[1:]
    assert all(" ".join(pair) in " ".join(command) for pair in zip(words[::2], words[1::2], strict=True))


def test_the_page_of_clients_has_the_versions_that_were_tried():
    text = text_of(DOCS / "clients.md")
    named = ("codex", "claude-code", "opencode", "continue", "aider", "llm", "pydantic-ai-chat", "langchain-chat")
    versions = [each.version for each in CLIENTS if each.name in named]
    assert [version for version in (*versions, version_of("ai")) if version not in text] == []


def test_every_importer_is_on_that_page():
    assert set(re.findall(r"<!-- import (\S+) ", text_of(DOCS / "migration.md"))) == set(IMPORTERS)
