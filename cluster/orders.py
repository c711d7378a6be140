"""What the ledger orders a replica to do, and how a replica describes the engine it has loaded.

The records are plain tuples, since they cross process borders. A replica is bound to its model's id only and learns
everything else, the configuration and the devices, from the order to load.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from cluster.config.store import KvStoreConfig
from cluster.waiting import Signal


class Address(NamedTuple):
    """Where an engine process listens.

    `unix` is the path of its socket on the Ray node `node`; `host` and `port` are for other nodes, port 0 = none, and
    every TCP connection must open with `token`.
    """

    node: str
    unix: str
    host: str = ""
    port: int = 0
    token: str = ""


class EngineState(NamedTuple):
    """A loaded engine, as its replica announces it.

    `devices` is the engine process's own CUDA_VISIBLE_DEVICES, split at commas; None = not set there. `slots` are those
    of the order to load. `url` is where the server listens that the engine is in, if it is in one; `pid` is that
    server's then.
    """

    address: Address
    pid: int
    memory_mib: int | None
    devices: tuple[str, ...] | None
    revision: str
    slots: int = 0
    url: str | None = None


class AsleepState(NamedTuple):
    """An engine that sleeps with its weights in the host's memory (level 1): what it holds there, and on each device.

    In MiB, as measured; what is still held on a device is its context.
    """

    host_mib: int
    device_mib: int


class Load(NamedTuple):
    """Load this engine.

    `config` is `ModelConfig.model_dump(mode="json", by_alias=False)`, `overrides` are engine keys that are laid over
    it for this load only, `devices` are indices of the node's devices. `revision` stands for both. Without a `kv_store`
    no conversation is saved.
    """

    model: str
    config: dict[str, Any]
    overrides: dict[str, Any]
    devices: tuple[int, ...]
    revision: str
    num_gpus: float
    slots: int = 0
    kv_store: KvStoreConfig | None = None


class Restart(NamedTuple):
    """Kill the engine process, which hangs. Its death is then reported as any other, and a new `Load` follows."""

    reason: str


class Unload(NamedTuple):
    """End the engine process, whether it serves, loads, sleeps or hangs; the replica stays.

    `engine_unloaded` answers once the process is gone, at once where there is none. Nothing else is told of an engine
    that ends in this way, also if it dies first.
    """

    reason: str


class Sleep(NamedTuple):
    """The engine moves its weights into the host's memory and gives back what it can of its devices (level 1).

    `engine_asleep` answers. An engine that cannot is unloaded, which `engine_unloaded` answers, also if it dies asleep.
    """


class Wake(NamedTuple):
    """The engine that sleeps serves again, on the devices that it has; answered like a `Load`.

    A replica whose engine is gone meanwhile answers `replica_failed`.
    """

    devices: tuple[int, ...]


class Prefetch(NamedTuple):
    """The model will be loaded here soon: have its files read into the page cache. `config` as in `Load`; no answer."""

    model: str
    config: dict[str, Any]


Order = Load | Restart | Unload | Sleep | Wake | Prefetch


class OrderBoard:
    """The last order to each replica, with a version, for the replica to ask for.

    An order stays until the next one replaces it, so that an answer that was lost is given again. Versions are
    unique across the lives of the ledger: a replica that has carried out an order of a former life is never told that
    it has seen one that it has not.
    """

    def __init__(self) -> None:
        self._version = time.time_ns()
        self._orders: dict[str, tuple[int, Order]] = {}
        self._given = Signal()
        self._asking: set[str] = set()
        self._gone: set[str] = set()

    def give(self, replica: str, order: Order) -> None:
        """Order a replica something; it takes the place of what was ordered before. Never blocks."""
        self._version += 1
        self._orders[replica] = (self._version, order)
        self._given.fire()

    def forget(self, replica: str) -> None:
        """A replica is gone. What it still asks for ends: it would hold its connection until then."""
        self._orders.pop(replica, None)
        if replica in self._asking:
            self._gone.add(replica)
            self._given.fire()

    async def after(self, replica: str, seen: int, timeout_s: float) -> tuple[int, Order | None]:
        """The replica's order with its version once it is another than the one seen; (seen, None) if none comes."""

        def is_new() -> bool:
            return replica in self._orders and self._orders[replica][0] != seen

        self._asking.add(replica)
        try:
            await self._given.until(lambda: is_new() or replica in self._gone, timeout_s)
        finally:
            self._asking.discard(replica)
            self._gone.discard(replica)
        return self._orders[replica] if is_new() else (seen, None)
