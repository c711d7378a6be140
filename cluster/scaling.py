"""The autoscaling policy of every model's deployment: as many replicas as the ledger wants, exactly.

Serve calls it ten times a second inside its controller's event loop, for each deployment, so it never blocks and never
raises. Serve sends this module to the controller by value: what all deployments share stands in `cluster.follower`.

A swap takes about six passes of that loop, one after another: the policy is asked, a replica is told to stop, seen to
have stopped, the other one is told to start, seen to have a process, told to initialise. So the loop runs faster from
a change on until all that should run does, where that is allowed (`effects.pace_controller`).
"""

from __future__ import annotations

from typing import Any


class LedgerPolicy:
    """The policy of one model's deployment; made in Serve's controller, from `policy_kwargs`."""

    def __init__(self, model: str) -> None:
        from cluster import effects, pace
        from cluster.follower import follower

        self._model = model
        self._follower = follower()
        self._pace = pace.of_this_process()
        effects.disregard_stale_requests(is_ours)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The count that the ledger wants; without word from it, no change."""
        target = int(context.target_num_replicas)
        wanted = self._follower.wanted(context.app_name, self._model)
        count = target if wanted is None else wanted
        self._pace.saw(context.deployment_id, count, target, context.current_num_replicas)
        return count, {}


def is_ours(context: Any) -> bool:
    """Whether the deployment of an autoscaling context has this policy."""
    return str(context.config.policy.policy_function).endswith("LedgerPolicy")
