"""What an outsider knows of a pool, and what it may demand of the ledger.

Which requests were sent and answered, which processes exist, who drains, what was asked of Serve: no more.
Every command of the ledger is judged against that, and it can be driven: the usual acts of clients, processes and
Serve are here; `machine.py` draws which of them happen, and when.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from cluster.ledger.events import (
    Command,
    EndReplica,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    Event,
    Grant,
    HolderAnnounced,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    LoadEngine,
    LoadRefused,
    LoadRequested,
    PrefetchModel,
    Quiesce,
    Reject,
    Reopen,
    ReplicaFailed,
    ReplicaGone,
    ReplicaReady,
    ReplicaStarted,
    ReplicaStopping,
    ReplicaSuspected,
    RequestArrived,
    RequestCancelled,
    RestartEngine,
    SetDesired,
    SleepEngine,
    Ticked,
    UnloadEngine,
    UnloadRequested,
    WakeEngine,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from cluster.ledger.states import TRANSITIONS, Cause, ReplicaState
from tests.sim import ray, serve

GPUS = 2
# A and B sleep with their engines, where replicas stay, and then C has no room beside what they hold; A always, B where
# that takes less than to load it.
DEVICE_MIB, HELD_MIB = 100, 20
MODELS = {
    "A": ModelSpec("A", slots=2, num_gpus=1.0, idle_timeout_s=5.0, load_timeout_s=20.0, memory_mib=40, sleep_level=1),
    "B": ModelSpec("B", slots=1, num_gpus=1.0, max_replicas=2, idle_timeout_s=30.0, load_timeout_s=20.0, sleep_level=0),
    "C": ModelSpec(
        "C", slots=2, num_gpus=2.0, idle_timeout_s=0.0, load_timeout_s=20.0, fallbacks=("A",), memory_mib=180
    ),
    "D": ModelSpec("D", slots=1, num_gpus=0.5, idle_timeout_s=0.0, max_queued=3, load_timeout_s=20.0),
    "P": ModelSpec("P", slots=1, num_gpus=0.5, pinned=True, manual=True, load_timeout_s=20.0),
}
NODE = NodeSpec("n", gpus=GPUS, cpus=4.0, device_memory_mib=DEVICE_MIB, host_memory_mib=4 * 1000)
SPEC = PoolSpec(
    models=MODELS, nodes={"n": NODE}, queue_max_size=12, bound_s=(5.0, 8.0, 12.0), asleep_device_mib=HELD_MIB
)
# Other machines than the one: a second of another size, with Serve's and Ray's own processes on the first, or on none.
CLUSTERS = {
    "one": dict(SPEC.nodes),
    "head": {"n": replace(NODE, is_head=True), "m": replace(NODE, name="m", gpus=1)},
    "flat": {"n": NODE, "m": replace(NODE, name="m", gpus=1)},
}
# What an ingress of an earlier deploy would have it: judged by this, all would be drained or forgotten.
OLD_SPEC = PoolSpec(
    models={"A": replace(MODELS["A"], revision="old", slots=1), "Z": replace(MODELS["A"], name="Z")},
    nodes=SPEC.nodes,
    queue_max_size=1,
)
WINDOW_S = 3.0
LOADING, READY, DRAINING = ReplicaState.LOADING, ReplicaState.READY, ReplicaState.DRAINING
UNLOADING, ASLEEP, STOPPING = ReplicaState.UNLOADING, ReplicaState.ASLEEP, ReplicaState.STOPPING


@dataclass
class Sent:
    """A request as its client sees it."""

    name: str
    holder: str
    model: str
    priority: int
    deadline: float
    number: int
    slots: int = 1
    grant: Grant | None = None
    answered: bool = False
    since: float = 0.0

    @property
    def rank(self) -> float:
        """Its place in line, as the configuration has it: lower goes first."""
        return self.since + (self.priority - 1) * SPEC.ageing_s


@dataclass
class Seen:
    """A process as an outsider sees it."""

    uid: str
    model: str
    number: int
    state: ReplicaState = LOADING
    node: str = "n"
    # the devices that Ray has booked for it
    booked: tuple[int, ...] = ()
    leases: set[str] = field(default_factory=set)
    devices: tuple[int, ...] = ()
    # Serve was asked to stop it; it was told so by Serve
    is_asked: bool = False
    is_told: bool = False
    # how many sequences the engine was loaded for
    slots: int = 0
    # its engine: told to load, loaded, told to be killed
    is_loading: bool = False
    has_engine: bool = False
    is_restarting: bool = False
    # told to sleep; what the engine that sleeps holds
    falls_asleep: bool = False
    sleeps_on: tuple[int, ...] = ()


class Outside:
    """The world around one ledger."""

    def __init__(self, max_asleep: int | None = 0, cluster: str = "one") -> None:
        """With `max_asleep` 0 a process ends with its engine, and is LOADING from its announcement on."""
        self.stays = max_asleep != 0
        self.nodes = CLUSTERS[cluster]
        self.gpus = sum(each.gpus for each in self.nodes.values())
        self.spec = replace(SPEC, max_asleep=max_asleep, nodes=self.nodes)
        self.now = 0.0
        self.numbers = 0
        self.lives = 1
        self.sent: dict[str, Sent] = {}
        self.seen: dict[str, Seen] = {}
        self.desired: dict[str, int] = dict.fromkeys(MODELS, 0)
        # how many of a model Serve was to stop when it was last told how many there should be
        self.to_stop: dict[str, int] = {}
        self.dead: set[str] = set()
        self.unasked = False
        self.unloaded: set[str] = set()
        # the models that had a process after the event before
        self.had: set[str] = set()
        # an operator's load may go before those who wait
        self.ordered: set[str] = set()
        self.ledger = Ledger(self.spec, epoch="e1", now=0.0)

    # --- what the ledger says is judged here --------------------------------------------------------------------

    def tell(self, event: Event) -> list[Command]:
        before = dict(self.desired)
        commands = self.ledger.decide(event, self.now)
        for command in commands:
            getattr(self, "_" + type(command).__name__.lower())(command)
        for model, count in self.desired.items():
            if count > before[model]:
                self._judge_start(model)
        self.had = {each.model for each in self.seen.values()}
        return commands

    def _judge_start(self, model: str) -> None:
        """Nobody's place goes to those who stand behind him in line. Whose own replica just left has had his."""
        # Whoever waits for C may have been sent to A.
        if self.unasked or model not in "ABD" or self.waiting("C") or model in self.ordered:
            return
        behind = min((each.rank for each in self.waiting(model)), default=float("inf"))
        rows = self.ledger.snapshot().models
        for sent in self.waiting():
            fits = MODELS[sent.model].num_gpus <= MODELS[model].num_gpus
            resting = (rows[sent.model].backoff_until or 0.0) > self.now
            if fits and sent.rank < behind and not (resting or self.alive(sent.model) or sent.model in self.had):
                assert self.desired[sent.model], f"{model} starts, and {sent} stands before its waiters"

    def _grant(self, grant: Grant) -> None:
        sent, seen = self.sent[grant.request], self.seen.get(grant.replica)
        if sent.grant is not None:
            assert grant == sent.grant, f"{grant} contradicts {sent.grant}"
            return
        assert seen is not None, f"{grant} goes to no process"
        assert seen.state is READY, f"{grant} goes to {seen}"
        assert not seen.is_told, f"{grant} goes to {seen}, which Serve stops"
        assert not sent.answered, f"{grant} was answered before"
        assert sent.holder not in self.dead, f"{grant} goes to a dead holder"
        taken = {slot for each in seen.leases for slot in self.sent[each].grant.slots}  # type: ignore[union-attr]
        assert not taken & set(grant.slots), f"slots {grant.slots} of {seen} are leased twice"
        slots = seen.slots
        assert len(set(grant.slots)) == min(sent.slots, slots), f"{grant} is not what {sent} asked for"
        assert len(taken) + len(grant.slots) <= slots, f"{seen} is full"
        assert seen.has_engine, f"{grant} goes to {seen}, whose engine is dead"
        # Who was sent to a fallback waits in another line.
        if sent.model == seen.model and not MODELS[sent.model].fallbacks:
            for other in self.waiting(sent.model):
                same = other.priority == sent.priority
                assert not (same and other.number < sent.number), f"{sent.name} overtook {other.name} of its class"
        sent.grant = grant
        seen.leases.add(sent.name)

    def _reject(self, reject: Reject) -> None:
        sent = self.sent[reject.request]
        assert sent.grant is None, f"{reject} of one that was granted"
        assert not sent.answered, f"{reject} was answered before"
        if reject.error == "BackendTimeout" and reject.extras["phase"] == "queued":
            assert sent.deadline <= self.now, f"{reject} came too early"
        if self.ledger.is_recovering and reject.error == "QueueFull":
            assert self.ledger.snapshot().queued >= self.spec.queue_max_size, f"{reject} for a line that says nothing"
        sent.answered = True

    def _setdesired(self, command: SetDesired) -> None:
        model = command.model
        if model not in MODELS:
            assert command.replicas == 0, f"{command} of a model that was removed"
            return
        alive, before = self.running(model), self.desired[model]
        outdated = [each for each in alive if each.leases and self.is_outdated(each)]
        # Where they stay, there may be one on each node.
        most = max(MODELS[model].max_replicas, len(self.nodes) * self.stays) + len(outdated)
        assert 0 <= command.replicas <= most or self.unasked, f"{command} is out of bounds"
        if command.replicas > before:
            moving = (STOPPING,) if self.stays else (DRAINING, STOPPING, ASLEEP)
            leaving = [each for each in alive if each.state in moving and each not in outdated]
            # On several nodes Serve might stop another in the stead of one that nobody asked for: then that one counts,
            # and both are taken to leave, though Serve stops no more than it was asked to.
            leave = min(len(leaving), self.to_stop.get(model, 0))
            is_there = self.unasked and command.replicas <= len(alive) - leave
            assert is_there or not leaving, f"{command} rises beside {leaving}"
        self.desired[model] = command.replicas
        self.to_stop[model] = max(0, len(alive) - command.replicas)
        # Serve stops those that come first by its own rules, whatever their engines do.
        order = self.in_order_of_stops(alive)
        stopped = order[: max(0, len(alive) - command.replicas)]
        assert not any(each.leases for each in stopped), f"{command} stops one of {stopped}"
        for each in stopped:
            each.is_asked = True
            if self.stays:
                assert each.state in (ASLEEP, STOPPING), f"{command} stops {each} with its engine"
                each.state = STOPPING
        # From here on Serve may be killing what has run dry, in its order: nobody may open it again.
        empty = [each for each in order if each.state is DRAINING and not each.leases]
        if not self.stays and not any(each.state is LOADING for each in alive):
            for each in empty[: max(0, before - command.replicas)]:
                each.state = STOPPING

    def _quiesce(self, command: Quiesce) -> None:
        seen = self.seen[command.replica]
        assert seen.state is READY, f"{command} of {seen}"
        may_go = seen.model != "P" or "P" in self.unloaded or seen.is_told or self.is_outdated(seen)
        assert may_go, f"{command}: a pinned model was chosen"
        seen.state = DRAINING

    def _reopen(self, command: Reopen) -> None:
        seen = self.seen[command.replica]
        assert seen.state is DRAINING, f"{command} of {seen}"
        assert seen.has_engine, f"{command} of {seen}, whose engine is dead"
        seen.state = READY

    def _loadengine(self, command: LoadEngine) -> None:
        seen = self.seen[command.replica]
        assert seen.state is (ASLEEP if self.stays else LOADING), f"{command} of {seen}"
        assert not seen.is_loading, f"{command} of {seen}, which loads already"
        assert not seen.has_engine, f"{command} of {seen}, which has an engine"
        assert not seen.is_told, f"{command} of {seen}, which obeys nobody any more"
        assert not seen.sleeps_on, f"{command} of {seen}, which has an engine that sleeps"
        self._takes(seen, command)

    def _wakeengine(self, command: WakeEngine) -> None:
        seen = self.seen[command.replica]
        assert seen.state is ASLEEP, f"{command} of {seen}"
        assert not seen.is_told, f"{command} of {seen}, which obeys nobody any more"
        assert seen.sleeps_on == command.devices, f"{command} of {seen}: it can wake where it sleeps only"
        seen.sleeps_on = ()
        self._takes(seen, command)

    def _takes(self, seen: Seen, command: LoadEngine | WakeEngine) -> None:
        """The devices of an order belong to one engine."""
        seen.slots = self.spec.models[seen.model].slots
        seen.is_loading, seen.devices, seen.state = True, command.devices, LOADING
        share = MODELS[seen.model].num_gpus
        assert len(command.devices) == -(-share // 1), f"{command} for {share} devices"
        if self.unasked:
            return
        for index in command.devices:
            here = [each for each in self.seen.values() if each.node == seen.node and index in each.devices]
            used = sum(min(1.0, MODELS[each.model].num_gpus) for each in here)
            assert used <= 1.0 + 1e-9, f"{command}: device {index} is given out twice"
            self._judge_memory(seen.node, index)

    def _judge_memory(self, node: str, index: int) -> None:
        """All that is loaded on a device, or sleeps there, has room."""
        here = [each for each in self.seen.values() if each.node == node]
        loaded = [MODELS[each.model] for each in here if index in each.devices]
        taken = sum(each.memory_mib // -(-each.num_gpus // 1) for each in loaded)
        held = HELD_MIB * sum(index in each.sleeps_on for each in here)
        assert taken + held <= DEVICE_MIB, f"device {index}: {taken} MiB are loaded, and {held} held asleep"

    def _unloadengine(self, command: UnloadEngine) -> None:
        seen = self.seen[command.replica]
        assert self.stays, f"{command}, though it ends with its engine"
        assert not seen.leases, f"{command} of {seen}, which is in use"
        seen.state, seen.falls_asleep = UNLOADING, False

    def _sleepengine(self, command: SleepEngine) -> None:
        seen = self.seen[command.replica]
        assert self.stays, f"{command}, though it ends with its engine"
        assert MODELS[seen.model].sleep_level != 2, f"{command}: it cannot"
        assert not seen.leases, f"{command} of {seen}, which is in use"
        assert seen.state is DRAINING, f"{command} of {seen}"
        seen.state, seen.falls_asleep = UNLOADING, True

    def _prefetchmodel(self, command: PrefetchModel) -> None:
        seen = self.seen[command.replica]
        assert seen.has_engine or seen.state is ASLEEP, f"{command} of {seen}, which has another order"
        # Whoever waits for C may have been sent to A.
        assert self.waiting(command.model) or self.waiting("C") or self.ordered, f"{command} for nobody"

    def _endreplica(self, command: EndReplica) -> None:
        assert self.seen[command.replica].state is UNLOADING, f"{command} of one that does nothing wrong"

    def _restartengine(self, command: RestartEngine) -> None:
        seen = self.seen[command.replica]
        assert seen.has_engine, f"{command} of {seen}, which has no engine"
        assert not seen.is_restarting, f"{command} of {seen} for a second time"
        seen.is_restarting = True

    def _loadrefused(self, command: LoadRefused) -> None:
        assert command.model in MODELS

    # --- what there is ------------------------------------------------------------------------------------------

    def waiting(self, model: str | None = None) -> list[Sent]:
        return [
            each
            for each in self.sent.values()
            if each.grant is None and not each.answered and model in (None, each.model)
        ]

    def leased(self) -> list[Sent]:
        return [each for each in self.sent.values() if each.grant is not None and not each.answered]

    def alive(self, model: str) -> list[Seen]:
        """A model's processes, oldest first."""
        return [each for each in self.seen.values() if each.model == model]

    def running(self, model: str) -> list[Seen]:
        """A model's processes that Serve has not told to stop, oldest first."""
        return [each for each in self.alive(model) if not each.is_told]

    def is_outdated(self, seen: Seen) -> bool:
        """Its engine was loaded by another configuration."""
        return bool(seen.slots) and seen.slots != self.spec.models[seen.model].slots

    def newest(self, model: str) -> Seen | None:
        """The process that Serve would stop first."""
        return next(iter(self.in_order_of_stops(self.running(model))), None)

    def in_order_of_stops(self, running: list[Seen]) -> list[Seen]:
        """Processes of a model in the order in which Serve would stop them."""
        left, order = list(running), []
        head = next((name for name, node in self.nodes.items() if node.is_head), None)
        everywhere = Counter(each.node for each in self.seen.values() if not each.is_told)
        while left:
            order.append(serve.may_stop(left, everywhere, head)[0])
            left.remove(order[-1])
        return order

    def leaving(self) -> list[Seen]:
        """Processes that drain, that failed or that Serve may be killing."""
        return [each for each in self.seen.values() if each.state in (DRAINING, STOPPING, ASLEEP)]

    def missing(self) -> list[str]:
        """Models of which Serve would start a process now."""
        return [
            model
            for model, count in self.desired.items()
            if count > sum(1 for each in self.running(model) if each.state is not STOPPING)
        ]

    def too_many(self) -> list[str]:
        """Models of which Serve would stop a process now."""
        return [model for model in MODELS if len(self.running(model)) > self.desired[model]]

    def inside(self, seen: Seen) -> ReplicaState:
        """The ledger's own view of a process, for what is legal."""
        for each in self.ledger.snapshot().replicas:
            if each.replica == seen.uid:
                return ReplicaState[each.state]
        raise AssertionError(f"{seen} is not on the books")

    # --- what everybody does ------------------------------------------------------------------------------------

    def pass_time(self, pause: float) -> None:
        self.now += pause
        self.tell(Ticked())

    def send(
        self,
        model: str,
        priority: int,
        holder: str = "h1",
        timeout: float = 300.0,
        keep_alive: float | None = None,
        slots: int = 1,
    ) -> list[Command]:
        self.numbers += 1
        name = f"r{self.numbers}"
        sent = Sent(name, holder, model, priority, self.now + timeout, self.numbers, slots, since=self.now)
        self.sent[name] = sent
        self.unloaded.discard(model)
        return self.tell(RequestArrived(name, holder, model, priority, self.now + timeout, keep_alive, slots))

    def arrival(self, sent: Sent) -> RequestArrived:
        """The event by which a request is asked for again."""
        return RequestArrived(sent.name, sent.holder, sent.model, sent.priority, sent.deadline, slots=sent.slots)

    def end(self, sent: Sent) -> None:
        """A request is over, as its client sees it."""
        sent.answered = True
        if sent.grant is not None and sent.grant.replica in self.seen:
            seen = self.seen[sent.grant.replica]
            seen.leases.discard(sent.name)
            if seen.is_told and not seen.leases:
                seen.state = STOPPING

    def release(self, sent: Sent) -> None:
        assert sent.grant is not None
        self.end(sent)
        self.tell(LeaseReleased(sent.name, sent.grant.generation))

    def cancel(self, sent: Sent) -> None:
        self.end(sent)
        self.tell(RequestCancelled(sent.name))

    def load(self, model: str, replicas: int) -> None:
        self.unloaded.discard(model)
        self.ordered.add(model)
        self.tell(LoadRequested(model, replicas))

    def unload(self, model: str) -> None:
        self.unloaded.add(model)
        self.tell(UnloadRequested(model))
        # Fallbacks may have taken some of them elsewhere.
        if not MODELS[model].fallbacks:
            assert not self.waiting(model), "somebody waits for a model that is being unloaded"

    def announce(self, model: str) -> None:
        """Ray starts a process, if it has room for it on any node, and it announces itself, twice."""
        # Where they stay, they take next to nothing of Ray's books.
        choices: dict[str, tuple[int, ...]] = dict.fromkeys(self.nodes, ())
        if not self.stays:
            choices = ray.choices(MODELS[model], self.nodes, self.seen.values(), MODELS)
        if not choices:
            return
        self.numbers += 1
        node = list(choices)[self.numbers % len(choices)]
        state = ASLEEP if self.stays else LOADING
        seen = Seen(f"{model}#{self.numbers}", model, self.numbers, state, node, choices[node])
        self.seen[seen.uid] = seen
        self.tell(ReplicaStarted(model, seen.uid, node, float(seen.number), booked=seen.booked))
        self.tell(ReplicaStarted(model, seen.uid, node, float(seen.number), booked=seen.booked))

    def loading(self) -> list[Seen]:
        """Those whose engine was told to load."""
        return [each for each in self.seen.values() if each.state is LOADING and each.is_loading and not each.is_told]

    def able(self, seen: Seen, causes: tuple[Cause, ...]) -> list[Cause]:
        """What a process can do by itself now: without an order to load there is no engine that could be loaded."""
        able = [cause for cause in causes if (self.inside(seen), cause) in TRANSITIONS]
        if seen.is_told:
            # It only lets end what runs, and says nothing more.
            return [cause for cause in able if cause is Cause.GONE]
        if not seen.falls_asleep:
            able = [cause for cause in able if cause is not Cause.SLEPT]
        if seen.state is not UNLOADING and not seen.sleeps_on:
            able = [cause for cause in able if cause is not Cause.UNLOADED]
        if seen.is_loading or seen.has_engine:
            return [cause for cause in able if cause is not Cause.LOADED or seen.is_loading]
        # Where it stays, an engine that was never ordered cannot fail either.
        engines = (Cause.LOADED, Cause.FAILED, Cause.ENGINE_DIED) if self.stays else (Cause.LOADED,)
        return [cause for cause in able if cause not in engines]

    def lose_settles(self, holder: str, lost: set[str], underway: set[str]) -> None:
        """What a holder has ended never reached the ledger; it announces what it has, some of it not yet granted."""
        has = [each for each in self.waiting() + self.leased() if each.holder == holder]
        for sent in [each for each in has if each.name in lost]:
            self.end(sent)
        kept = [each for each in has if not each.answered]
        held = [(each.name, each.grant.generation) for each in kept if each.grant and each.name not in underway]
        waiting = [each.name for each in kept if not each.grant or each.name in underway]
        self.tell(HolderAnnounced(holder, tuple(held), tuple(waiting)))

    def tell_to_stop(self, seen: Seen) -> None:
        """Serve tells a process to stop; what runs on it may end."""
        seen.is_asked = seen.is_told = True
        self.tell(ReplicaStopping(seen.uid))
        assert seen.state is not READY, f"{seen} was told to stop, and stays open"
        if not seen.leases and seen.state is not UNLOADING:
            seen.state = STOPPING

    def suspect(self, seen: Seen) -> None:
        self.tell(ReplicaSuspected(seen.uid))
        assert seen.is_restarting, f"{seen} hangs, and nobody restarts it"
        assert not self.tell(ReplicaSuspected(seen.uid)), "it is restarted already"

    def is_ready(self, seen: Seen) -> ReplicaReady:
        return ReplicaReady(seen.uid, None, None, tuple(map(str, seen.devices)), seen.slots, "")

    def act(self, seen: Seen, cause: Cause) -> None:
        """A process loads, fails or dies, or its engine does."""
        if cause is Cause.LOADED:
            if self.inside(seen) is LOADING:
                seen.state = READY
            seen.is_loading, seen.has_engine, seen.is_restarting = False, True, False
            self.tell(self.is_ready(seen))
            return
        if cause is Cause.SLEPT:
            seen.state, seen.sleeps_on, seen.devices = ASLEEP, seen.devices, ()
            seen.has_engine = seen.is_restarting = seen.falls_asleep = False
            self.tell(EngineAsleep(seen.uid, 100, HELD_MIB))
            return
        for name in list(seen.leases):
            self.end(self.sent[name])
        seen.is_loading = seen.has_engine = seen.is_restarting = False
        seen.falls_asleep = False
        if self.stays:
            seen.devices = seen.sleeps_on = ()
        if cause is Cause.UNLOADED:
            seen.state = ASLEEP
            self.tell(EngineUnloaded(seen.uid))
        elif cause is Cause.ENGINE_DIED:
            if seen.state is READY or self.stays:
                seen.state = ASLEEP if self.stays else LOADING
            self.tell(EngineDied(seen.uid, "it crashed"))
            # It is the ledger that counts how often.
            if not self.stays and self.inside(seen) in (ASLEEP, STOPPING):
                seen.state = ASLEEP
        elif cause is Cause.FAILED:
            seen.state = ASLEEP
            self.tell(ReplicaFailed(seen.uid, "it says no"))
        else:
            del self.seen[seen.uid]
            self.tell(ReplicaGone(seen.uid))

    # --- a new life of the ledger -------------------------------------------------------------------------------

    def lose_the_ledger(self, configured: bool, slots: int | None = None) -> None:
        """The ledger is back, empty. What Serve was told before it has done by the time that the window closes.

        With `slots` the models were configured anew, with so many, while it was away.
        Not `configured`, it was made with an older configuration, and hears of the present one from an ingress.
        """
        for each in self.seen.values():
            # Whom Serve was asked to stop, and has not told so yet, the next life cannot know, nor be judged by.
            each.is_asked = each.is_told
        if slots is not None:
            self.configure(slots)
        self.lives += 1
        self.dead.clear()
        self.unloaded.clear()
        self.ledger = Ledger(
            self.spec if configured else replace(OLD_SPEC, max_asleep=self.spec.max_asleep, nodes=self.nodes),
            epoch=f"e{self.lives}",
            now=self.now,
            recovering_until=self.now + WINDOW_S,
            configured=configured,
        )
        for seen in self.seen.values():
            seen.is_restarting = False

    def configure(self, slots: int) -> None:
        """From now on the configuration of A and B, which are loaded most often, says so many slots."""
        changed = {name: replace(self.spec.models[name], slots=slots) for name in "AB"}
        self.spec = replace(self.spec, models={**self.spec.models, **changed})

    def announcements(self, dying: set[str], dead_holders: set[str]) -> list[Event]:
        """What the new ledger hears, in no order: of each process, each lease and each waiter that is left."""
        events: list[Event] = [HolderDied(each) for each in sorted(dead_holders)]
        for sent in self.waiting() + self.leased():
            if sent.grant is not None:
                lease = sent.grant
                events.append(
                    LeaseReannounced(
                        sent.name,
                        sent.holder,
                        sent.model,
                        lease.replica,
                        lease.generation,
                        sent.priority,
                        len(lease.slots),
                    )
                )
                if lease.replica in dying or sent.holder in dead_holders:
                    self.end(sent)
            elif sent.holder in dead_holders:
                self.end(sent)
            else:
                events.append(self.arrival(sent))
        for seen in list(self.seen.values()):
            loads = seen.is_loading or seen.has_engine
            ends = seen.state is UNLOADING
            asleep = (100, HELD_MIB) if seen.sleeps_on and not ends else None
            devices, told = seen.devices or seen.sleeps_on, seen.is_told
            about = (seen.model, seen.uid, seen.node, float(seen.number), loads, devices, ends, told, seen.booked)
            events.append(ReplicaStarted(*about, 80, asleep))
            goes = seen.state in ((STOPPING,) if self.stays else (STOPPING, ASLEEP)) and not told
            if goes or seen.uid in dying:
                events.append(ReplicaGone(seen.uid))
                del self.seen[seen.uid]
            elif seen.has_engine and not ends:
                events.append(self.is_ready(seen))
                if not ends:
                    seen.state = READY
            elif not self.stays:
                seen.state = LOADING
        return events

    def hear(self, event: Event) -> None:
        """One announcement within the window: the ledger listens, and decides nothing."""
        if isinstance(event, RequestArrived):
            self.numbers += 1
            self.sent[event.request].number = self.numbers
            self.sent[event.request].since = self.now
        for command in self.tell(event):
            assert isinstance(command, Reject), f"{command} within the recovery window"
        self.ledger.check()

    def close_the_window(self) -> None:
        """Whoever holds a lease still does, under the number that he knows; its slot may be another."""
        names = {each.replica for each in self.ledger.snapshot().replicas}
        assert names == set(self.seen), f"{names} are on the books, {set(self.seen)} are alive"
        for sent in self.leased():
            assert sent.grant is not None
            told = self.ledger.decide(self.arrival(sent), self.now)
            assert len(told) == 1, f"the lease of {sent} was lost: {told}"
            grant = told[0]
            assert isinstance(grant, Grant), f"the lease of {sent} was lost: {grant}"
            assert (grant.replica, grant.generation) == (sent.grant.replica, sent.grant.generation)
            sent.grant = grant
        self.pass_time(WINDOW_S)
        assert not self.ledger.is_recovering

    def stop_one(self, model: str) -> None:
        """Serve stops a process: the first by its rules, whatever its engine does."""
        first = self.newest(model)
        assert first is not None
        assert not first.leases, f"Serve must stop {first}"
        self.act(first, Cause.GONE)

    def serve_does_its_work(self) -> None:
        """The usual course of things: what must start starts and loads, what must stop stops."""
        for _ in range(4):
            for model in self.too_many():
                if len(self.running(model)) > self.desired[model]:
                    self.stop_one(model)
            for seen in [each for each in self.seen.values() if each.is_told and not each.leases]:
                self.act(seen, Cause.GONE)
            for model in self.missing():
                self.announce(model)
            for seen in [each for each in self.seen.values() if each.state is UNLOADING]:
                self.act(seen, Cause.SLEPT if seen.falls_asleep else Cause.UNLOADED)
            for seen in self.loading():
                if seen.uid in self.seen:
                    self.act(seen, Cause.LOADED)
