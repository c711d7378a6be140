"""`slotpool validate`: whether a configuration can be served, and what of it fits at the same time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from app.cli.artifacts import ERROR, NOTE, WARNING, Artifact, Problem, estimated, examine
from app.cli.document import lay_over, serve_document_in
from app.cli.machine import Machine, machine
from app.cli.output import Column, Failure, emit, json_option, listed, mib, printable, show_json, table
from app.cli.plan import Plan, plan_of
from cluster.config import ConfigError, PoolConfig, load_config

COLUMNS = (
    Column("MODEL", "model"),
    Column("BACKEND", "backend"),
    Column("FILE", "file"),
    Column("SIZE", "size_mib", mib, is_number=True),
    Column("TAKES", "memory_mib", mib, is_number=True),
    Column("SLOTS", "slots", is_number=True),
    Column("RUNS ON", "place"),
)


@click.command("validate")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--gpus", type=click.IntRange(min=0), help="Plan for so many GPUs, not for those of this machine.")
@click.option("--gpu-memory", type=click.IntRange(min=1), metavar="MIB", help="What each GPU has, in MiB.")
@json_option
def command(config: Path, gpus: int | None, gpu_memory: int | None, as_json: bool) -> None:
    """Check CONFIG, the files of its models and what of it fits on this machine, and print the plan.

    CONFIG is a pool configuration in any shape that the pool reads, or a Serve configuration. Nothing is started or
    fetched. The exit status is 1 where something would not work.
    """
    try:
        pool = load_config(args_of(config))
    except ConfigError as error:
        if as_json:
            found = [Problem(ERROR, "", line)._asdict() for line in str(error).splitlines()]
            show_json({"config": str(config), "models": [], "gpus": [], "problems": found})
        raise
    artifacts = {name: examine(name, model) for name, model in pool.models.items()}
    here = machine(gpus, gpu_memory)
    plan = plan_of(plannable(estimated(pool, artifacts), here), here)
    problems = [*_of_artifacts(artifacts), *_of_machine(pool, plan, here, artifacts), *_of_servers(pool)]
    if as_json:
        show_json(
            {
                "config": str(config),
                "models": [row(pool, name, artifacts[name], plan) for name in pool.models],
                "gpus": [each._asdict() for each in here.devices],
                "problems": [each._asdict() for each in problems],
            }
        )
    else:
        _print(pool, artifacts, plan, here, problems)
    if any(each.level == ERROR for each in problems):
        raise Failure(f"{config.name} cannot be served as it is")


def args_of(config: Path) -> dict[str, Any]:
    """An application's args for a file: those of a Serve configuration, or the file itself."""
    document = serve_document_in(config)
    if document is None:
        return {"config": str(config)}
    args: dict[str, Any] = lay_over(document, None, None)["applications"][0].get("args") or {}
    return args


def plannable(pool: PoolConfig, here: Machine) -> PoolConfig:
    """The configuration without the models for which this machine has no devices at all."""
    if here.devices:
        return pool
    models = {
        name: model.model_copy(update={"cpu_offload_model": None, "fallbacks": ()})
        for name, model in pool.models.items()
        if not model.num_gpus
    }
    return pool.model_copy(update={"models": models})


def row(pool: PoolConfig, name: str, artifact: Artifact, plan: Plan) -> dict[str, Any]:
    """One model of the plan."""
    model = pool.models[name]
    return {
        "model": name,
        "backend": model.backend,
        "file": artifact.path.name if artifact.path else model.model_path,
        "size_mib": None if artifact.size is None else artifact.size >> 20,
        "memory_mib": artifact.memory_mib,
        "slots": pool.model_in_pool(model).slots,
        "devices": list(plan.devices[name]) if name in plan.devices else None,
        "place": place(name, bool(model.num_gpus), plan),
    }


def place(name: str, on_gpu: bool, plan: Plan) -> str:
    """Where a model goes, in words."""
    if name in plan.too_large:
        return "nowhere"
    if name in plan.waits:
        return "takes turns"
    if name not in plan.devices:
        return "?"
    return f"GPU {listed(plan.devices[name])}" if on_gpu else "CPU"


def _of_artifacts(artifacts: dict[str, Artifact]) -> list[Problem]:
    return [problem for artifact in artifacts.values() for problem in artifact.problems]


def _of_machine(pool: PoolConfig, plan: Plan, here: Machine, artifacts: dict[str, Artifact]) -> list[Problem]:
    found = []
    on_gpu = [name for name, model in pool.models.items() if model.num_gpus]
    if on_gpu and not here.devices:
        why = f"{', '.join(on_gpu)} want a GPU and this machine has none ({here.no_gpu}); plan with --gpus N"
        found.append(Problem(WARNING, "models", why))
    for name in plan.too_large:
        model, takes = pool.models[name], artifacts[name].memory_mib
        wants = f"{model.num_gpus:g} GPU(s)" + (f" and {mib(takes)}" if takes else "")
        has = f"{len(here.devices)} GPU(s)" + (f" of {mib(here.device_mib)}" if here.device_mib else "")
        found.append(Problem(ERROR, f"models.{name}", f"does not fit even alone: it wants {wants}, there are {has}"))
    on_host = [name for name in plan.devices if not pool.models[name].num_gpus]
    takes_mib = sum(artifacts[name].memory_mib or 0 for name in on_host)
    if here.host_mib and takes_mib > here.host_mib:
        text = f"the models on the CPU take {mib(takes_mib)}, and this machine has {mib(here.host_mib)}"
        found.append(Problem(WARNING, "mem_budget_mb", text))
    if plan.waits:
        text = f"no room for {', '.join(plan.waits)} beside the others: each loads when another gives way"
        found.append(Problem(NOTE, "models", text))
    return found


def _of_servers(pool: PoolConfig) -> list[Problem]:
    return [
        Problem(WARNING, f"servers.{index}.api_key_env", f"{server.api_key_env} is not set here")
        for index, server in enumerate(pool.servers)
        if server.api_key_env and server.api_key_env not in os.environ
    ]


def _print(
    pool: PoolConfig, artifacts: dict[str, Artifact], plan: Plan, here: Machine, problems: list[Problem]
) -> None:
    if pool.models:
        emit(table(COLUMNS, [row(pool, name, artifacts[name], plan) for name in pool.models]))
    for index, device in enumerate(here.devices):
        there = [name for name, devices in plan.devices.items() if index in devices]
        taken = sum((artifacts[name].memory_mib or 0) // max(1, len(plan.devices[name])) for name in there)
        size = f"{mib(taken)} of {mib(device.memory_mib)}" if device.memory_mib else mib(taken)
        click.echo(printable(f"GPU {index} ({device.name}): {', '.join(there) or 'free'}, {size}"))
    if pool.servers:
        click.echo(f"{len(pool.servers)} external server(s), which are not asked now.")
    for problem in problems:
        where = f"{problem.where}: " if problem.where else ""
        click.echo(printable(f"{problem.level}: {where}{problem.message}"))
    if not any(each.level == ERROR for each in problems):
        click.echo("The configuration can be served.")
