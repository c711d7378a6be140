"""The files of `cluster/manifests/`, as their tests read them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import yaml
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_cli

from app.cli import cli
from cluster.config import PoolConfig, load_config

MANIFESTS = Path("cluster/manifests")
#: What the manifests take from the environment of the pool.
KEYS = {"SLOTPOOL_KEY": "k" * 20, "SLOTPOOL_ADMIN_KEY": "a" * 20}

PROGRAMS: dict[str, click.Group] = {"slotpool": cli, "ray": ray_cli, "serve": serve_cli}


def documents(name: str) -> list[Any]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def pool_of(text: str, folder: Path) -> PoolConfig:
    """A pool's configuration as the pool itself reads it. Raises `ConfigError`."""
    file = folder / "pool.yaml"
    file.write_text(text)
    return load_config({"config": str(file)}, environ=KEYS)


def check_application(document: dict[str, Any], config: str) -> None:
    """A Serve configuration that Serve takes, with one application: the pool, configured by a file."""
    from app.build import build

    ServeDeploySchema.model_validate(document)
    (application,) = document["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert (application["name"], application["route_prefix"]) == ("slotpool", "/")
    assert application["args"] == {"config": config}
    ingress = build({"models": {}})._bound_deployment.name
    assert {each["name"] for each in application.get("deployments", ())} <= {ingress}


def check_command(line: str, *, is_named_only: bool = False) -> None:
    """A command line of `slotpool`, `ray` or `serve` whose command, options and arguments there are. Nothing is run.

    One that `is_named_only` may lack the arguments that it needs.
    """
    program, *words = shlex.split(line)
    group = PROGRAMS[Path(program).name]
    context = click.Context(group, info_name=program)
    command: click.Command | None = group
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        assert command is not None
        if not isinstance(command, click.Group) and not (is_named_only and not words):
            command.make_context(name, list(words), parent=context)
