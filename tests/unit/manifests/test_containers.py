"""Dockerfiles and the compose file. There is no Docker where tests run: `compose-spec` reads the compose file and
refuses what the specification does not have; of the Dockerfiles everything is checked that they take from here.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from app.cli.checks import refuse_strangers_without_keys
from app.cli.supervisor import GRACE_S, KILL_S, LEFTOVER_S
from tests.unit.manifests.files import MANIFESTS, check_command, pool_of

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (MANIFESTS / name).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_made_of_what_is_here(name: str):
    found = instructions(name)
    assert {kind for kind, _ in found} <= {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "CMD"}
    copied = [shlex.split(value) for kind, value in found if kind == "COPY" and not value.startswith("--from")]
    sources = [source for *those, _ in copied for source in those]
    allowed = [line[1:] for line in Path(".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in sources:
        assert Path(source).exists(), source
        assert source.split("/")[0] in allowed, "the .dockerignore keeps it out"
    packages = {
        line.strip('"*')
        for line in re.findall(r"include = \[(.*)\]", Path("pyproject.toml").read_text())[0].split(", ")
    }
    assert packages <= set(sources)
    for source in ("README.md", "LICENSE", ".ci/constraints.txt"):
        assert source in sources


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_the_pool_as_nobody_special(name: str):
    last: dict[str, str] = dict(instructions(name))
    check_command(shlex.join(json.loads(last["CMD"])))
    assert last["USER"] == "10001", "a number, so that Kubernetes can tell that it is not root"
    assert last["EXPOSE"] == "8000"


def test_both_images_differ_only_in_where_they_begin_and_what_llama_cpp_is_built_for():
    cpu, gpu = (dict(enumerate(instructions(name))) for name in DOCKERFILES)
    tails = [[each for each in found.values() if each[0] in ("COPY", "USER", "WORKDIR", "CMD")] for found in (cpu, gpu)]
    assert tails[0] == tails[1]


@pytest.fixture(scope="module")
def compose() -> Any:
    """The compose file with a value for every variable, as Compose reads it."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", r"/the/\1", (MANIFESTS / "compose.yaml").read_text())
    assert "${" not in text
    return yaml.safe_load(text)


def test_compose_takes_it(compose: Any):
    PyCompose.from_json(json.dumps(compose))
    with pytest.raises(ValueError, match="imge"):
        PyCompose.from_json(json.dumps({"services": {"pool": {"imge": "x"}}}))


def test_what_compose_mounts_and_builds_is_here(compose: Any):
    volumes = [each.split(":")[0] for service in compose["services"].values() for each in service["volumes"]]
    assert all((MANIFESTS / each).exists() for each in volumes if each.startswith("."))
    assert {each for each in volumes if re.match(r"\w", each)} == set(compose["volumes"])
    builds = [service["build"] for service in compose["services"].values() if "build" in service]
    assert [each["dockerfile"] for each in builds] == [f"cluster/manifests/{name}" for name in DOCKERFILES]
    assert {(MANIFESTS / each["context"]).resolve() for each in builds} == {Path.cwd()}


def test_compose_runs_a_pool_that_takes_keys_from_its_environment(compose: Any, tmp_path: Path):
    for name in ("slotpool", "slotpool-gpu"):
        service = compose["services"][name]
        check_command(shlex.join(service["command"]))
        assert {f"{service['command'][-1]}:ro"} <= {each.partition(":")[2] for each in service["volumes"]}
        pool = pool_of((MANIFESTS / "pool.yaml").read_text(), tmp_path)
        refuse_strangers_without_keys(service["environment"]["ROUTER_HOST"], pool)
        assert all(each.startswith("127.0.0.1:") for each in service["ports"]), "open to this machine alone"
        assert int(service["stop_grace_period"].rstrip("s")) > GRACE_S + LEFTOVER_S + KILL_S
