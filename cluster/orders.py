"""What the ledger orders a replica to do, and how a replica describes the engine it has loaded.

Plain tuples: they cross process borders. A replica is bound to its model's id only and learns everything else, the
configuration and the devices, from the order to load.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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

    `devices` is the engine process's own CUDA_VISIBLE_DEVICES, split at commas; None = not set there.
    """

    address: Address
    pid: int
    memory_mib: int | None
    devices: tuple[str, ...] | None
    revision: str


class Load(NamedTuple):
    """Load this engine.

    `config` is `ModelConfig.model_dump(mode="json", by_alias=False)`, `overrides` are engine keys that are laid over
    it for this load only, `devices` are indices of the node's devices. `revision` stands for both.
    """

    model: str
    config: dict[str, Any]
    overrides: dict[str, Any]
    devices: tuple[int, ...]
    revision: str
    num_gpus: float


class Restart(NamedTuple):
    """Kill the engine process, which hangs. Its death is then reported as any other, and a new `Load` follows."""

    reason: str


Order = Load | Restart
