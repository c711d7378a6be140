"""What the ledger tells those who watch it: every transition of a replica, and every swap that begins.

Facts of the past, beside the commands and of no effect: nothing is decided by them. A decision's transitions are
there until the next decision (`Ledger.transitions`).
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.ledger.states import ReplicaState


class Moved(NamedTuple):
    """A replica changed its state, for a cause of `states.py` in lower case, or `announced`: its process came.

    `record` numbers the replica records of this life of the ledger, since `replica`, the process, comes later. `reason`
    says why it drains or was taken back: `idle_timeout`, `surplus`, `operator`, `config`, `lost_node`, `unasked`,
    `withdrawn`, or why the swap began that it makes room for.
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


class SwapBegun(NamedTuple):
    """Room was promised to a model that waits, as soon as its victims are gone.

    `reason` is the worst that happens to any of them: `leaving` anyway, `idle`, `surplus`, busy with lower classes only
    (`class`), or busy because the waiters' `bound` comes near or the swap `pays`; `operator` for a load by hand.
    """

    model: str
    victims: tuple[str, ...]
    reason: str


Transition = Moved | SwapBegun
