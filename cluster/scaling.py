"""The autoscaling policy of every model's deployment: as many replicas as the ledger wants, exactly.

Serve calls it ten times a second inside its controller's event loop, for each deployment, so it never blocks and never
raises. Serve sends this module to the controller by value: what all deployments share stands in `cluster.follower`.
"""

from __future__ import annotations

from typing import Any


class LedgerPolicy:
    """The policy of one model's deployment; made in Serve's controller, from `policy_kwargs`."""

    def __init__(self, model: str) -> None:
        from cluster import effects
        from cluster.follower import follower

        self._model = model
        self._follower = follower()
        effects.disregard_stale_requests(is_ours)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The count that the ledger wants; without word from it, no change."""
        wanted = self._follower.wanted(context.app_name, self._model)
        return int(context.target_num_replicas) if wanted is None else wanted, {}


def is_ours(context: Any) -> bool:
    """Whether the deployment of an autoscaling context has this policy."""
    return str(context.config.policy.policy_function).endswith("LedgerPolicy")
