"""The versioned configuration, of which the ledger actor owns the one that is in force."""

from __future__ import annotations

from typing import Any, NamedTuple

from cluster.config.pool import PoolConfig


class Configuration(NamedTuple):
    """One state of the pool's configuration; of two, the one with the greater version is in force.

    `version` is the time of the deploy (`time.time()`) and a serial number of the changes made to it at run time.
    `runtime` names the models that were registered or replaced at run time and live in Serve applications of their
    own. `overrides` are engine keys of the present load only, by model id.
    """

    version: tuple[float, int]
    pool: PoolConfig
    runtime: frozenset[str] = frozenset()
    overrides: dict[str, dict[str, Any]] = {}  # noqa: RUF012 (never changed in place)
