"""Every call into Ray that is not on the path of a request: names, the ledger's birth, machines, deaths of actors.

Ray's private interfaces are used here and in `deployments/routing.py` and nowhere else, against the pinned version;
`tests/unit/test_ray_canaries.py` names each of them. Where a later Ray lacks one, the pool goes on without what it is
for: deaths of actors are then polled for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import ray

try:
    from ray._private.gcs_pubsub import GcsAioActorSubscriber
    from ray.core.generated.gcs_pb2 import ActorTableData
except ImportError:
    GcsAioActorSubscriber = ActorTableData = None
from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.applications import GRAPH, INGRESS, PREFIX
from cluster.config.names import deployment_name as deployment_name
from cluster.config.share import LEFT_GPUS
from cluster.config.store import KvStoreConfig
from cluster.config.version import Configuration
from cluster.gpus import Gpu, read_gpus
from cluster.ledger.specs import NodeSpec

logger = logging.getLogger("slotpool.effects")

APP_NAME = GRAPH
LEDGER_NAME = "slotpool-ledger"
NAMESPACE = "slotpool"

#: For how long a machine may take to say what its GPUs are, in seconds.
NODE_ANSWER_S = 10.0

#: How often deaths of actors are looked for where Ray does not tell of them, in seconds.
DEATHS_PERIOD_S = 1.0

_HEAD = "node:__internal_head__"
#: What Serve puts before the application, the deployment and the id in the name of a replica's actor.
_REPLICA = "SERVE_REPLICA::"
#: What the names of the placement groups begin with that reserve the devices of a node; its id follows.
_RESERVATION = "slotpool-devices-"


def get_or_create_ledger(actor_class: type[Any], configuration: Configuration) -> Any:
    """The handle of the pool's one ledger actor, which outlives whoever started it. Blocks for a moment."""
    return (
        ray.remote(actor_class)
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
        .remote(configuration)
    )


def find_ledger() -> Any:
    """The handle of the running ledger. Raises `ValueError` when there is none. Blocks for a moment."""
    return ray.get_actor(LEDGER_NAME, namespace=NAMESPACE)


def start_beside(actor_class: type[Any]) -> Any:
    """The handle of an actor on this process's node, if it has room, which ends with this process.

    Raises `ValueError` without a connection to Ray. Blocks for a moment; the actor starts in its own time.
    """
    if not ray.is_initialized():
        raise ValueError("this process has no connection to Ray: ray.init() makes it")
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": here}
    return ray.remote(actor_class).options(**options).remote()


def answer_of(called: Any) -> asyncio.Future[Any]:
    """The answer of a remote call, as a future of this event loop."""
    return asyncio.wrap_future(called.future())


def was_restarted() -> bool:
    """Whether this actor is a later life of one that died."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def end_process() -> None:
    """End this process at once, without a word to anybody; Ray starts the ledger's actor anew."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


async def kill_replica(replica: str) -> None:
    """End the process of a Serve replica that does not obey, as by kill -9. Of one that is gone: nothing."""
    await asyncio.to_thread(_kill_replica, replica)


def _kill_replica(replica: str) -> None:
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["name"].endswith(f"#{replica}"):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(each["name"], namespace=each["namespace"]), no_restart=True)


def this_actor() -> tuple[str, str]:
    """The ids of the actor that calls this, and of its node."""
    context = ray.get_runtime_context()
    return str(context.get_actor_id()), str(context.get_node_id())


def booked_devices() -> tuple[int, ...]:
    """The devices on which Ray has booked this process, by their indexes on its machine; none if it does not tell.

    Whatever a process may see of them: the public calls give the names that `CUDA_VISIBLE_DEVICES` has for them.
    """
    try:
        booked = ray._private.worker.global_worker.core_worker.resource_ids().get("GPU", ())
        return tuple(sorted(int(device) for device, _ in booked))
    except (AttributeError, TypeError, ValueError):
        return ()


def raylet_pid() -> int:
    """The process of Ray's own on this machine: the parent of all its workers, such as this one."""
    return os.getppid()


def log_folder() -> Path:
    """Where Ray keeps the logs of this machine's processes."""
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def open_host() -> str:
    """The address of this machine under which the cluster's others reach it; empty when there are none. Blocks."""
    others = sum(node["Alive"] for node in ray.nodes()) > 1
    return str(ray.util.get_node_ip_address()) if others else ""


def disregard_stale_requests(is_ours: Callable[[Any], bool]) -> None:
    """Keep Serve from starting a replica by itself, for the deployments whose context is ours. For Serve's controller.

    For a deployment without replicas whose handles have reported a waiting request, however long ago, Serve decides on
    one replica without asking its policy. Calling this twice changes nothing. Without the hook that happens again, and
    the ledger stops such a replica.
    """
    from ray.serve import autoscaling_policy

    original = getattr(autoscaling_policy, "_get_cold_start_scale_up_replicas", None)
    if original is None:
        logger.warning("Ray Serve may start replicas by itself: it has no _get_cold_start_scale_up_replicas")
    elif not hasattr(original, "slotpool"):

        def only_for_others(context: Any) -> int | None:
            return None if is_ours(context) else original(context)

        only_for_others.slotpool = True  # type: ignore[attr-defined]
        autoscaling_policy._get_cold_start_scale_up_replicas = only_for_others


def reservations() -> dict[str, bool]:
    """The nodes whose devices are reserved for the pool, or will be once others leave them; whether they are by now.

    Blocks for a moment.
    """
    groups = placement_group_table().values()
    return {
        group["name"].removeprefix(_RESERVATION): group["state"] == "CREATED"
        for group in groups
        if group["name"].startswith(_RESERVATION) and group["state"] != "REMOVED"
    }


def reserve_devices(node: str, gpus: int) -> None:
    """Ask Ray for the devices of a node, all but what replicas take of them; outlives this process. Blocks shortly."""
    there = {"ray.io/node-id": node}
    placement_group(
        [{"GPU": 1 - LEFT_GPUS}] * gpus,
        strategy="STRICT_PACK",
        name=f"{_RESERVATION}{node}",
        lifetime="detached",
        bundle_label_selector=[there] * gpus,
    )


def release_devices(node: str) -> None:
    """Give the devices of a node back to Ray, or no longer ask for them. Blocks for a moment."""
    for group_id, group in placement_group_table().items():
        if group["name"] == f"{_RESERVATION}{node}" and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


class Machines:
    """The cluster's live nodes with what they declare, and with what is known of their GPUs once that is known."""

    def __init__(self) -> None:
        self._gpus: dict[str, list[Gpu]] = {}

    async def read(self, memory_mib: int, kv_store: KvStoreConfig | None = None) -> dict[str, NodeSpec]:
        """The nodes as they are now. `memory_mib` is the configured budget of each (0 = none).

        What saved conversations may take of a host is taken off its memory once and for all, whatever they hold at a
        time; unset, that is a quarter of what is free then, and so a quarter of all at most.

        The budget of a device is the smallest one's memory on its node, and 0 (no limit) as long as the driver there
        was not asked, or has no answer.
        """
        nodes = await _live_nodes()
        return {
            node["NodeID"]: NodeSpec(
                name=node["NodeID"],
                gpus=int(node["Resources"].get("GPU", 0)),
                cpus=float(node["Resources"].get("CPU", 0)),
                memory_mib=memory_mib,
                device_memory_mib=min((gpu.total_mib for gpu in self._gpus.get(node["NodeID"], ())), default=0),
                device_uuids=tuple(gpu.uuid for gpu in self._gpus.get(node["NodeID"], ())),
                hosts=tuple(node[key] for key in ("NodeManagerHostname", "NodeManagerAddress") if node.get(key)),
                is_head=_HEAD in node["Resources"],
                host_memory_mib=_host_memory_mib(int(node["Resources"].get("memory", 0)) >> 20, kv_store),
            )
            for node in nodes
        }

    async def ask_devices(self) -> bool:
        """Ask the drivers of all nodes with GPUs that were not asked yet; whether there is news. May take seconds."""
        nodes = [node["NodeID"] for node in await _live_nodes() if node["Resources"].get("GPU", 0)]
        unknown = [node for node in nodes if node not in self._gpus]
        answers = await asyncio.gather(*(_gpus_of(node) for node in unknown))
        for node, (gpus, _) in zip(unknown, answers, strict=True):
            self._gpus[node] = gpus
        return any(gpus for gpus, _ in answers)


def _host_memory_mib(memory_mib: int, kv_store: KvStoreConfig | None) -> int:
    """What the saved conversations leave of a node's memory; 0 = it is not known."""
    if kv_store is None or not memory_mib:
        return memory_mib
    return max(1, memory_mib - (memory_mib // 4 if kv_store.mib is None else kv_store.mib))


async def _live_nodes() -> list[dict[str, Any]]:
    """The nodes that serve. One that Ray drains is as good as gone: what runs there ends, and nothing new comes."""
    nodes, draining = await asyncio.gather(asyncio.to_thread(ray.nodes), asyncio.to_thread(_draining_nodes))
    return [node for node in nodes if node["Alive"] and node["NodeID"] not in draining]


def _draining_nodes() -> set[str]:
    """The ids of the nodes that Ray is told to take out of service; none if it does not tell."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except AttributeError:
        return set()


async def gpus_of_all_nodes() -> tuple[list[tuple[str, Gpu]], str | None]:
    """Every GPU of the cluster with its node's name, and why there are none, or not all of them.

    Nodes that declare no GPU are not asked, except this one. Takes as long as the slowest node, at most
    `NODE_ANSWER_S`.
    """
    here = str(ray.get_runtime_context().get_node_id())
    asked = [node for node in await _live_nodes() if node["NodeID"] == here or node["Resources"].get("GPU", 0)]
    answers = await asyncio.gather(*(_gpus_of(node["NodeID"]) for node in asked))
    found = [
        (str(node["NodeManagerHostname"]), gpu) for node, (gpus, _) in zip(asked, answers, strict=True) for gpu in gpus
    ]
    # A node that declares none and has none is no fault as long as others have some.
    wanted = [node["Resources"].get("GPU", 0) or not found for node in asked]
    reasons = [reason for (_, reason), is_wanted in zip(answers, wanted, strict=True) if reason and is_wanted]
    return found, reasons[0] if reasons else None


async def _gpus_of(node: str) -> tuple[list[Gpu], str | None]:
    if node == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(read_gpus)
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    answer = ray.remote(read_gpus).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()
    try:
        return await asyncio.wait_for(answer, NODE_ANSWER_S)
    except (TimeoutError, RayError) as error:
        return [], f"node {node} does not answer: {type(error).__name__}"


async def dead_actors() -> AsyncIterator[str]:
    """Yields the id of every actor of the cluster whose process is confirmed dead, for ever.

    Within milliseconds; within `DEATHS_PERIOD_S` where Ray does not tell of them.
    """
    if GcsAioActorSubscriber is None:
        async for actor_id in _dead_actors_by_polling():
            yield actor_id
    subscriber = GcsAioActorSubscriber(address=ray.get_runtime_context().gcs_address)
    await subscriber.subscribe()
    while True:
        for actor_id, data in await subscriber.poll(batch_size=1000):
            if data.state in (ActorTableData.DEAD, ActorTableData.RESTARTING):
                yield actor_id.hex()


async def _dead_actors_by_polling() -> AsyncIterator[str]:
    restarts: dict[str, int] = {}
    told: set[str] = set()
    while True:
        for actor_id, actor in (await asyncio.to_thread(ray._private.state.actors)).items():
            is_dead = actor["State"] in ("DEAD", "RESTARTING")
            # One that was restarted between two looks died between them.
            has_died = actor["NumRestarts"] > restarts.get(actor_id, actor["NumRestarts"])
            restarts[actor_id] = actor["NumRestarts"]
            if not is_dead:
                told.discard(actor_id)
            if has_died or (is_dead and actor_id not in told):
                yield actor_id
            if is_dead:
                told.add(actor_id)
        await asyncio.sleep(DEATHS_PERIOD_S)


async def living_replicas() -> set[str]:
    """The ids of all replicas of models whose processes run, announced or not."""
    actors = await asyncio.to_thread(ray._private.state.actors, actor_state_name="ALIVE")
    replicas = set()
    for actor in actors.values():
        application, _, rest = actor["Name"].removeprefix(_REPLICA).partition("#")
        deployment, _, replica = rest.partition("#")
        is_ours = application == GRAPH or application.startswith(PREFIX)
        if is_ours and replica and deployment != INGRESS:
            replicas.add(replica)
    return replicas


async def is_dead(actor_id: str) -> bool:
    """Whether an actor is dead already; closes the gap between its announcement and the first event about it."""
    states = await asyncio.to_thread(ray._private.state.actors, actor_id)
    return not states or states["State"] == "DEAD"
