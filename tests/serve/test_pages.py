"""The commands and programs that README and docs/ show are run as they stand, against the pool that they are about."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pool import Pool, running_pool
from tests.unit.pages import DOCS, ROOT, blocks

SHOWN = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def pool(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """The pool of `serve_config.yaml`, from a file that can be read again."""
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    file = tmp_path_factory.mktemp("pool") / "pool.yaml"
    file.write_text(yaml.safe_dump(document["applications"][0]["args"]))
    with running_pool(port, {"config": str(file)}) as pool:
        yield pool
        pool.check()


def curls(page: Path) -> list[tuple[str, str]]:
    """Each `curl` that a page shows, with the answer that it shows; empty where it leaves that out."""
    found = []
    for block in blocks(page):
        for step in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            lines = step.splitlines()
            end = next(index for index, line in enumerate(lines) if not line.endswith("\\"))
            found.append(("\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :])))
    return [(command, answer) for command, answer in found if command.startswith("curl ")]


def is_like(shown: Any, answered: Any) -> bool:
    """Whether an answer has all the keys that are shown; it may have got more since."""
    if isinstance(shown, dict) and isinstance(answered, dict):
        return set(shown) <= set(answered) and all(is_like(shown[key], answered[key]) for key in shown)
    if isinstance(shown, list) and isinstance(answered, list):
        return not (shown and answered) or is_like(shown[0], answered[0])
    return True


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "api.md", DOCS / "admin.md"], ids=lambda page: page.name)
def test_every_curl_is_answered_as_shown(pool: Pool, page: Path):
    with pool.http() as http:
        # A later step of a page may begin where this one is loaded; nothing is where it is.
        http.post("/v1/admin/models/smollm2/load").raise_for_status()
    commands = curls(page)
    assert commands
    for command, shown in commands:
        command = command.replace(SHOWN, pool.url)
        if "gguf_n_ctx" in command:
            # "A model that is not loaded", as the page says.
            with pool.http() as http:
                http.post("/v1/admin/models/smollm2/unload").raise_for_status()
        ran = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
        # 141: `head` had seen enough, and what wrote for it was told so.
        assert ran.returncode in (0, 141), command
        if shown.startswith("{"):
            assert is_like(json.loads(shown), json.loads(ran.stdout)), f"{command}\n{ran.stdout}"
        elif shown:
            # Figures: how many of each there are depends on what was asked before.
            names = {line.partition("{")[0] for line in shown.splitlines()}
            assert {line.partition("{")[0] for line in ran.stdout.splitlines()} <= names
        else:
            assert "error" not in json.loads(ran.stdout), f"{command}\n{ran.stdout}"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "operating.md"], ids=lambda page: page.name)
def test_every_program_prints_what_is_shown(pool: Pool, page: Path, monkeypatch: pytest.MonkeyPatch):
    import ray

    # This process is a job of that Ray already.
    monkeypatch.setattr(ray, "init", lambda: None)
    program, shown = next(
        (each.text, after.text)
        for each, after in zip(blocks(page), blocks(page)[1:], strict=False)
        if each.language == "python"
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program.replace(SHOWN, pool.url), str(page), "exec"), {})
    # Another processor may choose another word somewhere; all of them have begun alike.
    assert printed.getvalue()[:10] == shown[:10]
    assert len(printed.getvalue()) > 20
