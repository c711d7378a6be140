"""Every call into Ray that is not on the path of a request: names, the ledger's birth, machines, deaths of actors.

Ray's private interfaces are used here and nowhere else, against the pinned version: the public API has no event for
"an actor died", and asking once a second would keep a crashed holder's slots for a second.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray._private.gcs_pubsub import GcsAioActorSubscriber
from ray.core.generated.gcs_pb2 import ActorTableData

from cluster.ledger.specs import NodeSpec, PoolSpec

APP_NAME = "slotpool"
LEDGER_NAME = "slotpool-ledger"
NAMESPACE = "slotpool"

_HEAD = "node:__internal_head__"


def deployment_name(model: str) -> str:
    """The Serve deployment of a model. Serve uses `#` and `/` in names of its own, so those are replaced."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "-", model)


def get_or_create_ledger(spec: PoolSpec) -> Any:
    """The handle of the pool's one ledger actor, which outlives whoever started it. Blocks for a moment."""
    from cluster.actor import LedgerActor

    return (
        ray.remote(LedgerActor)
        .options(
            name=LEDGER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=100_000,
            resources={_HEAD: 0.001},
        )
        .remote(spec)
    )


def find_ledger() -> Any:
    """The handle of the running ledger. Raises `ValueError` when there is none. Blocks for a moment."""
    return ray.get_actor(LEDGER_NAME, namespace=NAMESPACE)


def was_restarted() -> bool:
    """Whether this actor is a later life of one that died."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def this_actor() -> tuple[str, str]:
    """The ids of the actor that calls this, and of its node."""
    context = ray.get_runtime_context()
    return str(context.get_actor_id()), str(context.get_node_id())


def socket_path(replica: str) -> Path:
    """Where a replica of this machine listens, in the folder of Ray's own sockets, which goes when Ray goes."""
    return Path(ray._private.worker._global_node.get_sockets_dir_path()) / f"slotpool-{replica}.sock"


async def machines(memory_mib: int) -> dict[str, NodeSpec]:
    """The cluster's live nodes with what they declare. `memory_mib` is the configured budget of each (0 = none)."""
    nodes = await asyncio.to_thread(ray.nodes)
    return {
        node["NodeID"]: NodeSpec(
            name=node["NodeID"],
            gpus=int(node["Resources"].get("GPU", 0)),
            cpus=float(node["Resources"].get("CPU", 0)),
            memory_mib=memory_mib,
        )
        for node in nodes
        if node["Alive"]
    }


async def dead_actors() -> AsyncIterator[str]:
    """Yields the id of every actor of the cluster whose process is confirmed dead, within milliseconds, for ever."""
    subscriber = GcsAioActorSubscriber(address=ray.get_runtime_context().gcs_address)
    await subscriber.subscribe()
    while True:
        for actor_id, data in await subscriber.poll(batch_size=1000):
            if data.state in (ActorTableData.DEAD, ActorTableData.RESTARTING):
                yield actor_id.hex()


async def is_dead(actor_id: str) -> bool:
    """Whether an actor is dead already; closes the gap between its announcement and the first event about it."""
    states = await asyncio.to_thread(ray._private.state.actors, actor_id)
    return not states or states["State"] == "DEAD"
