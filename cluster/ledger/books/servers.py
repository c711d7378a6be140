"""External servers on the ledger's books: what each offers, the leases it holds, and the model that it has loaded.

A server is like a replica with `max_concurrent` slots whose model can change. Nothing is placed, loaded or stopped
for it: it is up while its manifest can be read, and it does its own loading. So a model that only servers offer is an
ordinary `Model` with a queue, and with room for no replica (`max_replicas` 0). Who goes next is decided in
`server_turns.py`; this file only keeps the books.
"""

from __future__ import annotations

from cluster.ledger.books.records import Model
from cluster.ledger.specs import ModelSpec, ServerSpec


class ServerLease:
    """One unique grant of a server's slot."""

    __slots__ = ("generation", "granted_at", "holder", "model", "request", "server", "slot", "waits")

    def __init__(
        self,
        request: str,
        holder: str,
        model: str,
        server: Server,
        generation: int,
        granted_at: float,
        waits: tuple[float, float],
    ) -> None:
        self.request = request
        self.holder = holder
        self.model = model
        self.server = server
        self.slot = server.free_slot()
        self.generation = generation
        self.granted_at = granted_at
        self.waits = waits


class Server:
    """One external server. `models` is what it offered when it was last heard, also while it cannot be reached.

    `current` is the model of the leases that it holds, None without any; `last` the one that it was last used for,
    and so most probably still has loaded. `settled_at` is when its first lease since the last swap ended.
    """

    __slots__ = (
        "allowed",
        "current",
        "drain_s",
        "error",
        "heard",
        "is_up",
        "last",
        "leases",
        "models",
        "settled_at",
        "spec",
        "turn",
    )

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.models: tuple[str, ...] = ()
        self.is_up = False
        self.heard = False
        self.error: str | None = None
        self.leases: dict[str, ServerLease] = {}
        self.current: str | None = None
        self.last: str | None = None
        self.settled_at: float | None = None
        self.drain_s = 0.0
        self.turn = 0
        # how many leases it may hold: more than `max_concurrent` only for as long as a lowered one takes effect
        self.allowed = spec.max_concurrent

    def __repr__(self) -> str:
        used = f"{len(self.leases)}/{self.spec.max_concurrent}"
        return f"<Server {self.spec.url} {'up' if self.is_up else 'down'} {used} {self.current}>"

    @property
    def is_busy(self) -> bool:
        return len(self.leases) >= self.spec.max_concurrent

    def free_slot(self) -> int:
        taken = {lease.slot for lease in self.leases.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def configure(self, spec: ServerSpec) -> None:
        """Take a new configuration; nothing that runs is cut."""
        self.spec = spec
        self.allowed = max(spec.max_concurrent, len(self.leases))

    def take(self, lease: ServerLease, turn: int) -> None:
        self.leases[lease.request] = lease
        self.turn = turn
        self.current = lease.model
        if self.last != lease.model:
            self.last = lease.model
            self.settled_at = None

    def give_back(self, lease: ServerLease, now: float) -> None:
        del self.leases[lease.request]
        took = now - lease.granted_at
        self.drain_s = took if took > self.drain_s else self.drain_s + 0.1 * (took - self.drain_s)
        self.allowed = max(self.spec.max_concurrent, len(self.leases))
        if self.settled_at is None:
            self.settled_at = now
        if not self.leases:
            self.current = None


class Servers:
    """All external servers, by URL, with their leases. A server that left the configuration stays until it is empty."""

    __slots__ = ("by_model", "known", "leases", "turns")

    def __init__(self) -> None:
        self.known: dict[str, Server] = {}
        self.leases: dict[str, ServerLease] = {}
        self.by_model: dict[str, list[Server]] = {}
        self.turns = 0

    @property
    def undecided(self) -> bool:
        """Some server was never heard: nobody knows yet which models there are."""
        return any(not server.heard for server in self.known.values())

    def index(self) -> None:
        """Recompute who offers what; after any change of a manifest or of the configuration."""
        self.by_model = {}
        for server in self.known.values():
            for name in server.models:
                self.by_model.setdefault(name, []).append(server)

    def offers(self, model: str) -> bool:
        """Some server that is up offers the model."""
        return any(server.is_up for server in self.by_model.get(model, ()))

    def error(self, model: str) -> str:
        """Why nobody offers a model that was offered before."""
        known = (server.error for server in self.by_model.get(model, ()) if server.error)
        return next(known, "its server is gone")

    def state(self, model: str) -> str | None:
        """A model's state in the admin route's words; None if no server knows it."""
        servers = self.by_model.get(model)
        if servers is None:
            return None
        up = [server for server in servers if server.is_up]
        if any(server.last == model or not server.spec.just_in_time for server in up):
            return "loaded"
        return "unloaded" if up else "failed"


def is_remote(model: Model) -> bool:
    """Only servers can serve this model."""
    return model.spec.max_replicas == 0


def remote_spec(name: str) -> ModelSpec:
    return ModelSpec(name, max_replicas=0)
