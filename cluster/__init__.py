"""Who may run: configuration, the error tree, the pure ledger with its policies, and the actor around it.

The scheduler for external servers is importable from here as a library. It is loaded when it is asked for, and never
loads Ray: the pool's own processes import this package in the middle of a model swap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.servers.library import (
        ConcurrentDispatcher,
        DispatcherTimeoutError,
        ModelNotAvailableError,
        NoModelsAvailableError,
        ServerConfig,
        ServerPool,
    )

__all__ = [
    "ConcurrentDispatcher",
    "DispatcherTimeoutError",
    "ModelNotAvailableError",
    "NoModelsAvailableError",
    "ServerConfig",
    "ServerPool",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cluster' has no attribute {name!r}")
    from cluster.servers import library

    return getattr(library, name)
