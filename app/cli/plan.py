"""What of a pool fits on a machine at the same time: the ledger itself is asked, with a request for every model.

So the plan cannot differ from what the pool will do with an empty machine. Files are looked at before; only figures
count here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from app.cli.machine import Machine
from cluster.config import PoolConfig
from cluster.ledger.events import Reject, RequestArrived
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import NodeSpec, PoolSpec

#: CPUs are not what a plan is about: there are always enough.
CPUS = 4096.0


class Plan(NamedTuple):
    """`devices` of each model that fits beside those before it, empty on the CPU; who `waits` for a swap; who fits
    nowhere (`too_large`), with the ledger's reason.
    """

    devices: dict[str, tuple[int, ...]]
    waits: tuple[str, ...]
    too_large: dict[str, str]


def plan_of(config: PoolConfig, machine: Machine) -> Plan:
    """Who stands where when every model is asked for, those first that are loaded at start. Pure."""
    node = NodeSpec(
        "this",
        gpus=len(machine.devices),
        cpus=CPUS,
        memory_mib=config.mem_budget_mb,
        device_memory_mib=machine.device_mib,
        device_uuids=tuple(each.uuid for each in machine.devices),
        hosts=tuple(_nodes_of(config)),
    )
    spec = replace(config.spec(), nodes={"this": node}, max_asleep=0, servers=(), variants={}, queue_max_size=0)
    too_large = {name: reason for name in spec.models if (reason := _refusal(spec, name)) is not None}
    fitting = {
        name: replace(model, fallbacks=(), manual=False) for name, model in spec.models.items() if name not in too_large
    }
    ledger = Ledger(replace(spec, models=fitting, queue_max_size=len(fitting)), epoch="plan", now=0.0)
    order = sorted(fitting, key=lambda name: not (fitting[name].preload or fitting[name].min_replicas))
    for name in order:
        ledger.decide(RequestArrived(name, "plan", name, 2, 1e9), 0.0)
    placed: dict[str, tuple[int, ...]] = {}
    for row in ledger.snapshot().replicas:
        placed[row.model] = tuple(sorted({*placed.get(row.model, ()), *row.devices}))
    return Plan(placed, tuple(name for name in fitting if name not in placed), too_large)


def _refusal(spec: PoolSpec, name: str) -> str | None:
    """Why a model does not even fit alone; None where it does."""
    alone = replace(spec.models[name], fallbacks=(), cpu_offload_model=None, manual=False, min_replicas=0, group=None)
    ledger = Ledger(replace(spec, models={name: alone}, queue_max_size=1), epoch="plan", now=0.0)
    commands = ledger.decide(RequestArrived(name, "plan", name, 2, 1e9), 0.0)
    return next((command.message for command in commands if isinstance(command, Reject)), None)


def _nodes_of(config: PoolConfig) -> set[str]:
    """The nodes that models are bound to: the plan takes this machine for all of them."""
    named = (device for model in config.models.values() for device in model.gpu if "/" in device)
    return {device.partition("/")[0] for device in named}
