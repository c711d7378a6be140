"""What the ledger knows of models, nodes and the pool: plain frozen data, made from the configuration.

Units stand last in a name; resources are floats in Ray's units (`num_gpus=0.5` is half a device).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model as the ledger sees it. `slots` is the concurrency of one replica; 0 in `idle_timeout_s` means never.

    `group` names models that are placed with an eye on each other: with `group_share` False (the default) no two
    models of the group stand on one device, with True a replica only goes where another of the group already is, or,
    being the first, where all of the group may go.
    `devices` are the only ones that it may stand on: "0" (of any node), "node/1", "GPU-uuid" or "node/GPU-uuid"; empty
    means any. A node is named as in `NodeSpec.name` or one of its `hosts`.
    `revision` is any text that changes whenever the engine's own configuration did: replicas of an older revision
    are drained and started anew on demand. `sleep_timeout_s` is how long a replica without an engine stays, 0 = until
    there are too many. `sleep_level` says what an engine that loses its devices does: 2 = it ends, 1 = it sleeps with
    its weights in the host's memory where there is room for them, 0 = whichever brings it back sooner.
    """

    name: str
    slots: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 0.0
    memory_mib: int = 0
    min_replicas: int = 0
    max_replicas: int = 1
    max_queued: int | None = None
    idle_timeout_s: float = 300.0
    load_timeout_s: float = 120.0
    pinned: bool = False
    preload: bool = False
    manual: bool = False
    cpu_offload_model: str | None = None
    fallbacks: tuple[str, ...] = ()
    group: str | None = None
    group_share: bool = False
    revision: str = ""
    devices: tuple[str, ...] = ()
    sleep_timeout_s: float = 0.0
    sleep_level: int = 2


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One machine of the cluster: whole devices, CPUs, and device memory in MiB (0 = unknown, not limited).

    `memory_mib` is the budget of the whole node, `device_memory_mib` that of each of its devices. `device_uuids` are
    the driver's names of the devices, in order, and `hosts` other names by which people know the node. `is_head`: Serve
    and Ray themselves run on it, so Serve stops its replicas last. `host_memory_mib` is what Ray has of the machine's
    own memory (0 = unknown).
    """

    name: str
    gpus: int = 0
    cpus: float = 0.0
    memory_mib: int = 0
    device_memory_mib: int = 0
    device_uuids: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    is_head: bool = False
    host_memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One external server, whose name is its URL. `api_key_env` names the variable that holds its key.

    `just_in_time`: it keeps one model loaded and swaps when it is asked for another, cutting whatever still runs.
    """

    url: str
    max_concurrent: int = 1
    just_in_time: bool = True
    api_key_env: str | None = None


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Everything the ledger is told about the pool.

    `capacity` is resident models, 0 = unlimited; `node_memory_mib` is the budget of each node, 0 = not limited, and
    reaches the ledger in every `NodeSpec`.

    The scheduling parameters, with defaults that suit loads of seconds and requests of seconds to minutes. The
    simulator (`tests/bench/bench_policy.py`) explains them. Where the resident models pause now and then, whoever is
    loaded goes first and the pool is as good as that rule: mean waits within 15 % of it with any of six seeds, and 5
    to 300 times better than a swap on demand; bounds and paying swaps then lie idle. Where a flood never pauses, that
    rule starves the visitor (848 s), while ours lets him in after 14 s at most, at 15 loads instead of 2. Longer
    bounds mean fewer swaps and longer worst waits. A crowd larger than the devices can serve in `bound_s` waits
    longer whatever is chosen: the bound is what the pool strives for, not an admission limit (`queue_max_size` is).

    `max_asleep` is how many replicas are kept without an engine, ready to load one without a new process; None: as many
    as the hosts have room for. With 0 a replica ends with its engine. `asleep_device_mib` is the most that an engine
    which sleeps may still hold of each of its devices.

    `variants`          public name -> ((model, weight), ...): A/B variants, chosen in turn by weight.
    `bound_s`           the longest wait for a *place* that the pool strives for, per class (high, medium, low). The
                        drain of a resident model begins early enough (expected drain and load) to keep it. None = 3,
                        8 or 20 times what a swap to the model costs, and never under 5, 15 or 40 s.
    `ageing_s`          a class lower counts as having arrived this much later: high goes first, but a medium that
                        waits `ageing_s` longer than a high overtakes it. 0 = pure first come, first served.
    `min_residency_s`   how long a freshly loaded *busy* model keeps its place against swaps that merely pay; never
                        less than `residency_loads` times its learned load time. A reached bound ignores both.
    `turn_swaps`        a model that got a place and has work keeps it for so many times its swap cost (a stop and its
                        load), also when everybody is overdue: a backlog is served in turns, not in single batches.
    `load_prior_s`      the load time assumed of a model that was never loaded.
    `upscale_wait_s`    a model with a ready replica asks for another one when its oldest waiter waited this long, or
                        when a whole replica's worth of requests waits.
    `server_batch_s`    for how long after a swap an empty server goes on with its model though others came earlier.
    `server_turn_s`     the same where everybody is overdue: about four times a load, so that no more than a fifth of
                        the server's time goes into swaps.
    `backoff_s`         first and longest pause after a failed load; it doubles in between.
    `max_keep_alive_s`  for so long after the last request a pin by a request does not give way to a bound.
    `drain_timeout_s`   after this long a drain revokes what is still leased: far beyond the longest request allowed.
    """

    models: dict[str, ModelSpec] = field(default_factory=dict)
    nodes: dict[str, NodeSpec] = field(default_factory=dict)
    capacity: int = 0
    queue_max_size: int = 100
    offload_queue_threshold: int = 0
    drain_timeout_s: float = 3600.0
    max_keep_alive_s: float = 3600.0
    variants: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    bound_s: tuple[float | None, float | None, float | None] = (None, None, None)
    ageing_s: float = 30.0
    min_residency_s: float = 1.0
    residency_loads: float = 1.0
    turn_swaps: float = 3.0
    load_prior_s: float = 5.0
    upscale_wait_s: float = 2.0
    backoff_s: tuple[float, float] = (1.0, 60.0)
    node_memory_mib: int = 0
    max_asleep: int | None = 0
    asleep_device_mib: int = 600
    servers: tuple[ServerSpec, ...] = ()
    server_batch_s: float = 20.0
    server_turn_s: float = 20.0
