"""The life of a replica as a diagram, drawn from the ledger's own table of transitions."""

from __future__ import annotations

from cluster.ledger.states import TRANSITIONS, Cause, ReplicaState

#: A process may die in any state; nine more arrows would hide the others.
ANYWHERE = Cause.GONE


def mermaid() -> str:
    """The diagram, in the language of Mermaid."""
    arrows: dict[tuple[ReplicaState, ReplicaState], list[str]] = {}
    for (before, cause), after in TRANSITIONS.items():
        if cause is not ANYWHERE or before is ReplicaState.STOPPING:
            arrows.setdefault((before, after), []).append(cause.name.lower().replace("_", " "))
    lines = [f"    {_name(ends[0])} --> {_name(ends[1])}: {', '.join(causes)}" for ends, causes in arrows.items()]
    return "\n".join(["stateDiagram-v2", *lines])


def _name(state: ReplicaState) -> str:
    return "[*]" if state is ReplicaState.COLD else state.name
