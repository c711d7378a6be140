"""What one replica takes of Ray's books for as long as it lives, and what is left to replicas where the pool reserves.

Where a replica ends with its engine, it takes what its engine uses, and Ray keeps others off it. Where replicas stay,
most of them have no engine: each takes next to nothing, just enough that Ray starts it on a machine with devices, and
the pool reserves the devices as a whole (`cluster/reservation.py`). Which engine uses them is the ledger's affair.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.config.models import ModelConfig
from cluster.config.pool import PoolConfig

#: What a replica that stays takes of a device: the least that Ray can count.
SLEEPER_GPUS = 0.0001
#: What a reservation leaves of each device: room for 100 such replicas, and of no use to anybody else.
LEFT_GPUS = 0.01


class Share(NamedTuple):
    """Devices and CPUs, in Ray's units."""

    num_gpus: float
    num_cpus: float


def share_of(pool: PoolConfig, model: ModelConfig) -> Share:
    """What Ray books for each replica of a model."""
    if pool.max_asleep == 0:
        return Share(model.num_gpus, model.num_cpus)
    return Share(SLEEPER_GPUS if model.num_gpus else 0.0, 0.0)
