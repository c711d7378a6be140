"""What README and docs/ say is there is there: pages, commands and flags, paths, tests, configurations, figures.

None of this runs what a page shows; it holds the words of the pages to the repository, so that neither moves alone.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import click
import jsonschema
import pytest
import yaml
from starlette.routing import BaseRoute, Match

from app.cli import COMMANDS, cli
from app.cli.importers import IMPORTERS
from app.http import build_http
from cluster.config import load_config
from cluster.config.schema import POOL, schemas
from tests.unit.pages import ALL, DOCS, PAGES, ROOT, Block, anchors, code, links, section, spans, text_of
from tests.unit.scripted import Scripted

#: A block of YAML whose first line names one of these is that program's.
FOREIGN = ("llama-swap", "LiteLLM", "Continue", "llm")
#: Variables that the configurations of the pages take from the environment.
ENVIRONMENT = dict.fromkeys(("SLOTPOOL_KEY", "TEAM_KEY", "LITELLM_MASTER_KEY"), "k")
ROOMS = r"(?:app|cluster|deployments|docs|tests|\.ci)/"


def in_language(*languages: str) -> list[Any]:
    return [pytest.param(each, id=str(each)) for each in ALL if each.language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    wrong = []
    for target in links(page):
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (fragment and fragment not in anchors(there)):
            wrong.append(target)
    assert wrong == []


def test_the_readme_is_short():
    assert text_of(PAGES[0]).count("\n") <= 150
    assert (DOCS / "status-page.png").stat().st_size < 200_000


def test_every_page_is_reached_from_the_readme():
    seen, ahead = set(), [PAGES[0]]
    while ahead:
        page = ahead.pop()
        if page not in seen:
            seen.add(page)
            found = ((page.parent / target.partition("#")[0]).resolve() for target in links(page))
            ahead.extend(each for each in found if each.suffix == ".md" and each.is_file())
    assert [each.name for each in PAGES if each not in seen] == []


@cache
def make() -> tuple[set[str], set[str]]:
    """The targets and the variables of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) *[:?]?= *(.*)$", text, re.MULTILINE))
    names = re.findall(r"^([^\s#:=]+(?: [^\s#:=]+)*):(?!=)", text, re.MULTILINE)
    filled = re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], ""), " ".join(names))
    return set(filled.split()), set(variables)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_exists(page: Path):
    targets, variables = make()
    wrong = []
    for line in code(page):
        for words in re.findall(r"(?:^|[^\w-])make((?: [A-Z_]+=[^\s,]*| [.a-z][\w./-]*)+)", line.partition("#")[0]):
            for word in words.split():
                name, is_set, _ = word.partition("=")
                if name not in (variables if is_set else targets):
                    wrong.append(f"make{words}")
    assert wrong == []


def command_lines(page: Path) -> Iterator[str]:
    """Every line of a shell that begins with `slotpool`."""
    for line in code(page):
        found = re.match(r"(?:\$ |eval \"\$\()?slotpool ((?:[a-z]|--)[^#|>)]*)", line)
        if found:
            yield found[1].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_flag_exists(page: Path):
    wrong = []
    for line in command_lines(page):
        words = shlex.split(line)
        if words[0] in ("--help", "--version", "COMMAND", "PROGRAM"):
            continue
        command = cli.get_command(click.Context(cli), words[0])
        if command is None:
            wrong.append(line)
            continue
        known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}
        wrong.extend(
            f"{line}: {word}" for word in words[1:] if word.startswith("-") and word.split("=")[0] not in known
        )
        if words[0] == "import" and not {*words[1:2]} <= {*IMPORTERS, "PROGRAM"}:
            wrong.append(line)
    assert wrong == []


def test_the_page_of_the_command_line_has_every_command_and_no_flag_of_its_own():
    page = DOCS / "cli.md"
    shown = {word for each in spans(page) for word in re.findall(r"\w+", each.partition(" ")[0])}
    assert set(COMMANDS) - shown - {line.split()[0] for line in command_lines(page)} == set()
    known = {
        option
        for name in COMMANDS
        for each in cli.get_command(click.Context(cli), name).params  # type: ignore[union-attr]
        for option in (*each.opts, *each.secondary_opts)
    }
    said = {word for each in spans(page) for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", each)}
    assert said - known - {"--help"} == set()


@pytest.mark.parametrize("block", in_language("yaml"))
def test_every_configuration_is_one(block: Block):
    if re.match(rf"# (?:{'|'.join(FOREIGN)}): ", block.text):
        return
    data = yaml.safe_load(block.text)
    if not isinstance(data, dict) or "scrape_configs" in data:
        return
    config = load_config(data, environ=ENVIRONMENT)
    assert config.spec().models or config.servers or config.api_keys or config.kv_store_mib
    editors_schema().validate(data)


@cache
def editors_schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schemas()[POOL])


@pytest.mark.parametrize("block", in_language("json", "toml", "python"))
def test_every_other_block_can_be_read(block: Block):
    {"json": json.loads, "toml": tomllib.loads, "python": ast.parse}[block.language](block.text)


# What changed once may have gone since.
@pytest.mark.parametrize("page", [each for each in PAGES if each.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_path_exists(page: Path):
    wrong = []
    for line in code(page):
        for path in re.findall(rf"(?<![\w/.~-])({ROOMS}[\w./*-]*|serve_config\.yaml|Makefile|pyproject\.toml)", line):
            path = path.rstrip(".")
            if not any(ROOT.glob(path)):
                wrong.append(path)
    assert wrong == []


def is_known(routes: list[BaseRoute], path: str) -> bool:
    scope = {"type": "http", "path": path, "root_path": "", "method": "GET", "headers": []}
    return any(each.matches(scope)[0] is not Match.NONE for each in routes)


@pytest.mark.parametrize("name", ["api.md", "admin.md"])
def test_every_route_exists(name: str):
    # Without the last one, which takes whatever the others do not.
    routes = build_http(cast(Any, Scripted())).router.routes[:-1]
    said = {
        path.rstrip("/")
        for line in code(DOCS / name)
        for path in re.findall(r"(?:^|[ (]|:8000)(/(?:v1|api|admin|llm-pool|models|metrics)/?[\w/{}-]*)(?!…)", line)
    }
    prefixes = {"/v1/admin", "/admin", "/v1", "/models"}
    assert len(said) > 10
    assert sorted(path for path in said - prefixes if not is_known(routes, path)) == []


@cache
def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_exists(page: Path):
    wrong = []
    for file, name in re.findall(r"([\w/]+\.py)::(\w+)", text_of(page)):
        path = ROOT / "tests" / file.removeprefix("tests/")
        if not path.is_file() or name not in functions_in(path):
            wrong.append(f"{file}::{name}")
    assert wrong == []


def test_every_failure_names_its_test():
    rows = [line for line in text_of(DOCS / "failures.md").splitlines() if line.startswith("| ")]
    assert [row for row in rows if "::" not in row and not row.startswith("| what |")] == []


def test_every_figure_of_the_readme_was_measured():
    table = section(ROOT / "README.md", "what-it-promises-and-what-was-measured")
    rows = [line for line in table.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) > 5
    for row in rows:
        said, link = re.fullmatch(r"\| .+ \| (.+) \(\[[^]]+\]\(([^)]+)\)\) \|", row).groups()  # type: ignore[union-attr]
        path, _, fragment = link.partition("#")
        measured = section(ROOT / path, fragment)
        for figure in re.findall(r"\d(?:[\d,]*\d)?(?:\.\d+)?(?: (?:ms|MiB)\b)?", said):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", measured), f"{figure} of {row}"
