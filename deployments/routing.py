"""The router that sends a leased request to the one replica that its lease names, and to no other.

Serve's own router balances by queue length; here the ledger has already chosen. The hook overridden is the one that
Ray's experimental capacity router overrides, in the pinned version.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.errors import ReplicaGone

#: There is no second way to send a call to one certain replica through Serve, so the pool does not start without this.
NO_HOOK = "this version of Ray Serve has no router that a leased request could be pinned with"

try:
    from ray.serve._private.request_router.common import PendingRequest
    from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
    from ray.serve._private.request_router.replica_wrapper import RunningReplica
except ImportError as error:
    raise ImportError(f"{NO_HOOK}: {error}") from error


#: How long a replica that the ledger calls ready may stay unknown to this process, in seconds: Serve tells its
#: handles of a new replica a moment after the replica itself has told the ledger.
APPEAR_S = 10.0

if not hasattr(PowerOfTwoChoicesRequestRouter, "_choose_replica_for_request"):
    raise ImportError(f"{NO_HOOK}: PowerOfTwoChoicesRequestRouter._choose_replica_for_request")


class PinRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Reads the replica's unique id from `handle.options(session_id=…)`. A call without one is balanced by Serve."""

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        unique_id = pending_request.metadata.session_id
        if not unique_id:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        if is_retry:
            raise ReplicaGone(f"replica {unique_id} refused the request")
        try:
            return await asyncio.wait_for(self._appearance(unique_id), APPEAR_S)
        except TimeoutError:
            raise ReplicaGone(f"replica {unique_id} is gone") from None

    async def _appearance(self, unique_id: str) -> Any:
        while True:
            for replica_id, replica in self._replicas.items():
                if replica_id.unique_id == unique_id:
                    return replica
            self._replicas_updated_event.clear()
            await self._replicas_updated_event.wait()
