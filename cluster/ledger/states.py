"""The life of a replica: every state, every cause, and the one table of legal transitions.

Theory of operation
-------------------
A replica record is born when the ledger decides to start one. From then on its resources are taken, whatever the
state, until its process is *confirmed* dead: memory is credited at COLD and nowhere else.

    COLD ──placed──▶ STARTING ──loaded──▶ READY ──quiesced──▶ DRAINING ──emptied──▶ STOPPING ──gone──▶ COLD
                        │  │                ▲                    │
                        │  │                └─────reopened───────┘
                        │  │  ▲             │ (its engine died)
                        │  │  └─────────────┘
                        │  └─withdrawn──▶ STOPPING
                        └──────failed────▶ FAILED ──gone──▶ COLD        (READY and DRAINING may fail, too)

STARTING   a process was asked for. It is *unbound* until one announces itself; only an unbound record may vanish
           without a death (`withdrawn` by way of `gone`): there is nothing yet that could hold memory.
READY      serves, and is the only state that gets new leases.
DRAINING   no new lease, the leases that it holds go on. Its leases never grow. It may be reopened, since nobody has
           been told to stop it. An empty one moves on in the same step, unless a newer one of its model still
           drains or any of it starts: Serve would stop that one first.
STOPPING   the desired count was lowered and Serve may be killing it right now, so there is no way back, and it holds
           no lease.
FAILED     the engine is of no use; the desired count was lowered, the process is waited for like a STOPPING one.

An engine may die apart from its replica (`engine died`). A STARTING or READY one loads again in place, in the same
process and on the same devices: READY goes back to STARTING, its leases end, its waiters stay. A DRAINING one has no
leases left and nothing to be reopened for, and moves on like any that has run dry.

Two rules guard the border to Serve, which acts late and picks by itself *which* replica of a model it stops:

1. While a model has a record in DRAINING, STOPPING or FAILED, its desired count is never raised. Lowering and raising
   before Serve has acted would cancel each other out: the old process would stay and the new one never come. And a
   replica that starts beside a draining one is newer, so Serve would stop it in the other's stead.
2. If another replica dies than the one in STOPPING, that one's leases are revoked and its record is removed like in
   any death, and the STOPPING one *stays* STOPPING; the desired count falls once more. To take it back to READY would
   be a guess (the other may have crashed by itself while Serve is killing this one), and a wrong guess routes
   requests into a dying process. The extra replica is started again on demand; the eviction still makes progress.

A `gone` is legal in every state, for a process may die at any time; what it held is revoked. All that is not in the
table is illegal: it is logged and changes nothing.
"""

from __future__ import annotations

from enum import IntEnum


class ReplicaState(IntEnum):
    """Where a replica record stands; see the module's theory of operation."""

    COLD = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    STOPPING = 4
    FAILED = 5

    @property
    def is_desired(self) -> bool:
        """Serve should keep a process for it."""
        return ReplicaState.STARTING <= self <= ReplicaState.DRAINING

    @property
    def is_leaving(self) -> bool:
        """Its process is expected to die, soon and without being asked again."""
        return self >= ReplicaState.STOPPING

    @property
    def may_hold_leases(self) -> bool:
        return self in (ReplicaState.READY, ReplicaState.DRAINING)


class Cause(IntEnum):
    """Why a replica changes its state."""

    PLACED = 0
    LOADED = 1
    QUIESCED = 2
    REOPENED = 3
    EMPTIED = 4
    WITHDRAWN = 5
    FAILED = 6
    GONE = 7
    ENGINE_DIED = 8


_S, _C = ReplicaState, Cause

TRANSITIONS: dict[tuple[ReplicaState, Cause], ReplicaState] = {
    (_S.COLD, _C.PLACED): _S.STARTING,
    (_S.STARTING, _C.LOADED): _S.READY,
    (_S.STARTING, _C.WITHDRAWN): _S.STOPPING,
    (_S.STARTING, _C.FAILED): _S.FAILED,
    (_S.STARTING, _C.GONE): _S.COLD,
    (_S.STARTING, _C.ENGINE_DIED): _S.STARTING,
    (_S.READY, _C.QUIESCED): _S.DRAINING,
    (_S.READY, _C.FAILED): _S.FAILED,
    (_S.READY, _C.GONE): _S.COLD,
    (_S.READY, _C.ENGINE_DIED): _S.STARTING,
    (_S.DRAINING, _C.REOPENED): _S.READY,
    (_S.DRAINING, _C.EMPTIED): _S.STOPPING,
    (_S.DRAINING, _C.FAILED): _S.FAILED,
    (_S.DRAINING, _C.GONE): _S.COLD,
    (_S.DRAINING, _C.ENGINE_DIED): _S.DRAINING,
    (_S.STOPPING, _C.GONE): _S.COLD,
    (_S.FAILED, _C.GONE): _S.COLD,
}
