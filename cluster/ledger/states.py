"""The life of a replica: every state, every cause, and the one table of legal transitions.

Theory of operation
-------------------
A replica is a process that stays; its engine, a process of its own, comes and goes. A replica record is born when the
ledger decides to start one. What an engine takes of a node is taken from the decision to load it until the end of its
process is *confirmed*: it is credited at UNLOADED (the engine has ended as ordered), when the engine failed or died,
or at COLD, and nowhere else.

    COLD ──placed──▶ STARTING ──announced──▶ ASLEEP ──assigned──▶ LOADING ──loaded──▶ READY ──quiesced──▶ DRAINING
                                             ▲    │ │                │                  ▲                  │   │
                                             │    │ │demoted         │withdrawn         └─────reopened─────┘   │emptied
                                             │    │ └────────────┐   ▼                                         ▼
                                             │    │              ▶ UNLOADING ◀─────────────────────────────────┘
                                             └────┼── unloaded, slept ─┘
                                                  └──dismissed──▶ STOPPING ──gone──▶ COLD

    LOADING, READY, DRAINING ──failed, engine died──▶ ASLEEP                            any ──gone──▶ COLD

STARTING   a process was asked for and has not announced itself: the record is *unbound*. Only such a one may vanish
           without a death (by way of `gone`): there is nothing yet that could hold memory.
ASLEEP     the replica is there and has no engine (level 2), or one that sleeps with its weights in the host's memory
           (level 1). It is *placed* as long as devices are booked for it all the same, which is so only in a pool that
           keeps no replicas without engines. What a sleeping engine still holds of its devices is booked without that.
LOADING    its engine loads or wakes, or will when the pause after a failure is over, on devices that are its own.
READY      serves, and is the only state that gets new leases.
DRAINING   no new lease, the leases that it holds go on. Its leases never grow. It may be reopened, since nobody has
           been told to end anything. An empty one moves on in the same step.
UNLOADING  its engine was told to end, or to sleep, and there is no way back. It holds no lease.
STOPPING   the desired count was lowered and Serve may be killing it right now, so there is no way back, and it holds
           no lease.

An engine may die apart from its replica (`engine died`). A LOADING or READY one loads again in place, in the same
replica and on the same devices: it is ASLEEP and LOADING again in one step, its leases end, its waiters stay. A
DRAINING one has no leases left and nothing to be reopened for.

An engine that sleeps wakes on the devices that it has slept on, or not at all: anywhere else it must be loaded, and
ends first (`demoted`). So it ends when what it holds there is in somebody's way, is more than the configuration
allows, or when the host has no room for it. One that dies asleep costs nothing but the quick way back (`unloaded`). A
waking that fails or takes too long is withdrawn, and then the engine is loaded, while its waiters stay; a falling
asleep that takes too long is an unload.

Where no replicas are kept without an engine (`max_asleep` 0) a replica ends with its engine: DRAINING and LOADING go
straight to STOPPING (`dismissed`), what is ASLEEP only waits to be stopped, and what was booked for the engine is
credited when the process is gone, since Ray has promised it to that process.

Four rules guard the border to Serve, which acts late and picks by itself *which* replica of a model it stops:

1. While a model has a replica that is to be stopped, its desired count is never raised. Lowering and raising before
   Serve has acted would cancel each other out: the old process would stay and the new one never come. And a replica
   that starts beside one that is to be stopped is newer, so Serve would stop it in the other's stead.
2. If another replica dies than the one in STOPPING, that one's leases are revoked and its record is removed like in
   any death, and the STOPPING one *stays* STOPPING; the desired count falls once more. To take it back to READY would
   be a guess (the other may have crashed by itself while Serve is killing this one), and a wrong guess routes
   requests into a dying process. The extra replica is started again on demand; the eviction still makes progress.
3. A replica is dismissed only when Serve, by its own rules, would stop it or another one that is dismissed already
   (`books.stops`). Until then it waits, empty. So does one that only drained since it is out of date, where another
   was started beside it.
4. A replica says so when Serve has told it to stop, and to each new life of the ledger again: it gets nobody new, and
   counts no more among the desired. Whom Serve was asked to stop and has not told yet, a new life cannot know. It takes
   that one for one that stays, and says the higher count as soon as it decides anything. Should Serve be faster all the
   same, the replica still lets end what it was granted meanwhile, so nobody's stream is cut.

A `gone` is legal in every state, for a process may die at any time; what it held is revoked. All that is not in the
table is illegal: it is logged and changes nothing.
"""

from __future__ import annotations

from enum import IntEnum


class ReplicaState(IntEnum):
    """Where a replica record stands; see the module's theory of operation."""

    COLD = 0
    STARTING = 1
    LOADING = 2
    READY = 3
    DRAINING = 4
    UNLOADING = 5
    ASLEEP = 6
    STOPPING = 7

    @property
    def is_desired(self) -> bool:
        """Serve should keep a process for it."""
        return ReplicaState.STARTING <= self <= ReplicaState.ASLEEP

    @property
    def is_going(self) -> bool:
        """Its engine serves no more, or will not without another decision; what it holds becomes free, soon."""
        return self >= ReplicaState.DRAINING

    @property
    def is_leaving(self) -> bool:
        """Its engine or its process is expected to end, without being asked again."""
        return self >= ReplicaState.UNLOADING

    @property
    def may_hold_leases(self) -> bool:
        return self in (ReplicaState.READY, ReplicaState.DRAINING)


class Cause(IntEnum):
    """Why a replica changes its state."""

    PLACED = 0
    ANNOUNCED = 1
    ASSIGNED = 2
    LOADED = 3
    QUIESCED = 4
    REOPENED = 5
    EMPTIED = 6
    WITHDRAWN = 7
    UNLOADED = 8
    FAILED = 9
    ENGINE_DIED = 10
    DISMISSED = 11
    GONE = 12
    SLEPT = 13
    DEMOTED = 14


_S, _C = ReplicaState, Cause

TRANSITIONS: dict[tuple[ReplicaState, Cause], ReplicaState] = {
    (_S.COLD, _C.PLACED): _S.STARTING,
    (_S.STARTING, _C.ANNOUNCED): _S.ASLEEP,
    (_S.STARTING, _C.GONE): _S.COLD,
    (_S.ASLEEP, _C.ASSIGNED): _S.LOADING,
    (_S.ASLEEP, _C.DEMOTED): _S.UNLOADING,
    (_S.ASLEEP, _C.UNLOADED): _S.ASLEEP,
    (_S.ASLEEP, _C.DISMISSED): _S.STOPPING,
    (_S.ASLEEP, _C.GONE): _S.COLD,
    (_S.LOADING, _C.LOADED): _S.READY,
    (_S.LOADING, _C.WITHDRAWN): _S.UNLOADING,
    (_S.LOADING, _C.FAILED): _S.ASLEEP,
    (_S.LOADING, _C.ENGINE_DIED): _S.ASLEEP,
    (_S.LOADING, _C.DISMISSED): _S.STOPPING,
    (_S.LOADING, _C.GONE): _S.COLD,
    (_S.READY, _C.QUIESCED): _S.DRAINING,
    (_S.READY, _C.FAILED): _S.ASLEEP,
    (_S.READY, _C.ENGINE_DIED): _S.ASLEEP,
    (_S.READY, _C.GONE): _S.COLD,
    (_S.DRAINING, _C.REOPENED): _S.READY,
    (_S.DRAINING, _C.EMPTIED): _S.UNLOADING,
    (_S.DRAINING, _C.FAILED): _S.ASLEEP,
    (_S.DRAINING, _C.ENGINE_DIED): _S.ASLEEP,
    (_S.DRAINING, _C.DISMISSED): _S.STOPPING,
    (_S.DRAINING, _C.GONE): _S.COLD,
    (_S.UNLOADING, _C.UNLOADED): _S.ASLEEP,
    (_S.UNLOADING, _C.SLEPT): _S.ASLEEP,
    (_S.UNLOADING, _C.GONE): _S.COLD,
    (_S.STOPPING, _C.GONE): _S.COLD,
}
