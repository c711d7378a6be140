"""What the ledger tells those who watch it: every transition of a replica, and every swap that begins.

Facts of the past, beside the commands and of no effect: nothing is decided by them. A decision's transitions are
there until the next decision (`Ledger.transitions`).
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.ledger.states import ReplicaState


class Because(NamedTuple):
    """Why something was decided. What does not belong to a rule is None.

    `rule` is a `reason` as below; of a start it is `demand`, `operator` or `kept` (without demand). `waiter` is the
    request for whose sake it is, `bound_in_s` how far its bound still was (negative: it was overdue), `cost_s` what the
    victims' users lose by it, in request-seconds, and `victims` all that must go together.
    """

    rule: str
    waiter: str | None = None
    bound_in_s: float | None = None
    cost_s: float | None = None
    victims: tuple[str, ...] = ()


class Moved(NamedTuple):
    """A replica changed its state, for a cause of `states.py` in lower case, or `announced`: its process came.

    `record` numbers the replica records of this life of the ledger, since `replica`, the process, comes later. `reason`
    says why it drains, ends or was taken back: `max_asleep` (too many sleep, or too much), `idle_timeout`, `surplus`,
    `operator`, `config`, `lost_node`, `unasked`, `stopped`, `wake` (it failed), `withdrawn`, or why the swap began that
    it makes room for.
    """

    model: str
    record: int
    replica: str | None
    node: str
    devices: tuple[int, ...]
    before: ReplicaState
    after: ReplicaState
    cause: str
    reason: str = ""
    because: Because | None = None


class SwapBegun(NamedTuple):
    """Room was promised to a model that waits, as soon as its victims are gone.

    `reason` is the worst that happens to any of them: `leaving` anyway, `idle`, `surplus`, busy with lower classes only
    (`class`), or busy because the waiters' `bound` comes near or the swap `pays`; `operator` for a load by hand.
    """

    model: str
    victims: tuple[str, ...]
    reason: str
    because: Because | None = None


Transition = Moved | SwapBegun
