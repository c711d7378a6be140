"""The world around a ledger, on a virtual clock: machines, Ray Serve, engines, clients, and all that goes wrong.

Everything is drawn from one seeded generator, so a seed reproduces a run to the last event. The world keeps its own
truth: which process really lives, what it really takes, which stream really runs where. It accuses the ledger when a
stream is cut, when a process is overcommitted, or when a request is granted to a process that cannot serve it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.ledger.events import (
    Command,
    EndReplica,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    Event,
    Grant,
    HolderAnnounced,
    LeaseReannounced,
    LeaseReleased,
    LoadEngine,
    Reject,
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
    WakeEngine,
)
from cluster.ledger.specs import PoolSpec
from tests.sim import ray, serve


class Scheduler(Protocol):
    """What the world asks of a ledger, ours or a rival's."""

    def decide(self, event: Event, now: float) -> list[Command]: ...

    def next_deadline(self) -> float | None: ...


@dataclass
class Faults:
    """How often and how badly the world misbehaves; all zero = a perfect world."""

    late_s: float = 0.0
    twice: float = 0.0
    load_fails: float = 0.0
    load_hangs: float = 0.0
    never_starts: float = 0.0
    dies_after_s: float = 0.0
    wrong_victim: float = 0.0
    engine_dies_after_s: float = 0.0
    engine_hangs: float = 0.0
    unload_hangs: float = 0.0
    sleep_fails: float = 0.0
    sleep_hangs: float = 0.0
    wake_fails: float = 0.0
    wake_hangs: float = 0.0
    loses: float = 0.0
    cancels: float = 0.0
    leaks: float = 0.0
    load_spread: float = 0.0


@dataclass
class Request:
    """A client's request and what became of it."""

    name: str
    model: str
    holder: str
    priority: int
    arrived: float
    service_s: float
    slots: int = 1
    width: int = 0
    granted: float | None = None
    generation: int = 0
    replica: str = ""
    rejected: str | None = None
    done: bool = False
    cancelled: bool = False
    # what its client does when it is over, however it ended
    then: Callable[[], None] | None = None

    @property
    def wait_s(self) -> float | None:
        return None if self.granted is None else self.granted - self.arrived


@dataclass(eq=False)
class Process:
    """A replica's real process: pending, starting, waiting for its order to load, loading, ready, failed, stopping.

    `number` grows in the order in which processes come to run. Asleep it has an engine, which holds something of
    `devices`; falling asleep and waking are on the way there and back. `turn` counts its orders.
    """

    uid: str
    model: str
    node: str
    number: int
    load_s: float
    state: str = "pending"
    devices: tuple[int, ...] = ()
    # the configuration that its engine was loaded by
    slots: int = 0
    revision: str = ""
    # what it was when Serve told it to stop
    before: str = ""
    # what Ray has booked for it, which it keeps until the process is gone
    booked: tuple[int, ...] = ()
    turn: int = 0
    # its engine has slept and not woken: it holds next to nothing of its devices
    rests: bool = False
    streams: dict[str, Request] = field(default_factory=dict)
    # when its last word reaches the ledger: they keep their order
    heard_at: float = 0.0


class World:
    """One simulated cluster with one scheduler in it."""

    def __init__(
        self,
        spec: PoolSpec,
        make: Callable[[float], Scheduler],
        *,
        seed: int = 0,
        load_s: dict[str, float] | float = 2.0,
        start_s: float = 0.5,
        stop_s: float = 0.2,
        loop_s: float = 0.1,
        faults: Faults | None = None,
        after_step: Callable[[World], None] | None = None,
    ) -> None:
        self.spec = spec
        self.random = random.Random(seed)
        self.load_s = load_s
        self.start_s, self.stop_s, self.loop_s = start_s, stop_s, loop_s
        self.faults = faults or Faults()
        # Only a world in which everybody does as told, in time, can blame the ledger for what happens to a stream.
        self.is_gentle = not (
            self.faults.late_s
            or self.faults.twice
            or self.faults.dies_after_s
            or self.faults.wrong_victim
            or self.faults.engine_dies_after_s
            or self.faults.engine_hangs
            or self.faults.unload_hangs
            or self.faults.sleep_hangs
            or self.faults.wake_hangs
            or self.faults.loses
        )
        # Where everything starts and loads at once, nobody is told that a load took too long.
        self.is_prompt = self.is_gentle and not (self.faults.load_hangs or self.faults.never_starts)
        # replicas of other applications, by node: Serve counts them when it chooses
        self.others: Counter[str] = Counter()
        # what an engine that sleeps holds of its host and of each device, by model
        self.asleep_mib: dict[str, tuple[int, int]] = {}
        # what engines are measured to take, by model; nothing is measured of the others
        self.memory_mib: dict[str, int] = {}
        self.restarted = False
        self.after_step = after_step
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count(1)
        self.scheduler = make(self.now)
        self.desired: dict[str, int] = {}
        self.processes: dict[str, Process] = {}
        self.requests: dict[str, Request] = {}
        self.dead_holders: set[str] = set()
        self.waking: float | None = None
        self.swaps = 0
        self.steps = 0
        self.cut: list[str] = []
        self.crimes: list[str] = []

    # --- the clock ----------------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (max(when, self.now), next(self.numbers), action))

    def run(self, until: float = float("inf"), max_steps: int = 10_000_000) -> None:
        """Let time pass until nothing is left to happen, or `until`."""
        while self.heap and self.heap[0][0] <= until and max_steps:
            max_steps -= 1
            self.now, _, action = heapq.heappop(self.heap)
            action()
        if until < float("inf"):
            self.now = max(self.now, until)

    def tell(self, event: Event, of: Process | None = None) -> None:
        """An event reaches the scheduler: perhaps late, perhaps twice. What one process says keeps its order."""
        faults = self.faults
        copies = 2 if faults.twice and self.random.random() < faults.twice else 1
        for _ in range(copies):
            delay = self.random.expovariate(1.0 / faults.late_s) if faults.late_s else 0.0
            if of is not None:
                of.heard_at = max(of.heard_at, self.now + delay)
                delay = of.heard_at - self.now
            if delay > 0.0:
                self.at(self.now + delay, lambda: self.post(event))
            else:
                self.post(event)

    def post(self, event: Event) -> None:
        self.steps += 1
        for command in self.scheduler.decide(event, self.now):
            self._obey(command)
        if self.after_step is not None:
            self.after_step(self)
        self._wake_later()

    def _wake_later(self) -> None:
        due = self.scheduler.next_deadline()
        if due is not None and (self.waking is None or due < self.waking):
            self.waking = due
            self.at(due, lambda: self._wake(due))

    def _wake(self, due: float) -> None:
        if self.waking == due:
            self.waking = None
            self.post(Ticked())

    # --- clients ------------------------------------------------------------------------------------------------

    def submit(
        self,
        model: str,
        service_s: float,
        *,
        priority: int = 2,
        timeout_s: float = 1e6,
        holder: str = "ingress",
        keep_alive_s: float | None = None,
        slots: int = 1,
    ) -> Request:
        request = Request(f"r{next(self.numbers)}", model, holder, priority, self.now, service_s, slots)
        self.requests[request.name] = request
        self.tell(RequestArrived(request.name, holder, model, priority, self.now + timeout_s, keep_alive_s, slots))
        if self.faults.cancels and self.random.random() < self.faults.cancels:
            self.at(self.now + self.random.expovariate(0.5), lambda: self.cancel(request))
        return request

    def cancel(self, request: Request) -> None:
        if not request.done and request.holder not in self.dead_holders:
            request.cancelled = True
            self._finish(request, tell=False)
            self.tell(RequestCancelled(request.name))

    def kill_holder(self, holder: str) -> None:
        from cluster.ledger.events import HolderDied

        self.dead_holders.add(holder)
        for request in list(self.requests.values()):
            if request.holder == holder and not request.done:
                self._finish(request, tell=False)
        self.tell(HolderDied(holder))

    def _granted(self, grant: Grant) -> None:
        request = self.requests[grant.request]
        if request.holder in self.dead_holders:
            return
        if request.done:
            # Nobody waits for it any more: the actor gives it back.
            self.at(self.now, lambda: self.tell(LeaseReleased(grant.request, grant.generation)))
            return
        if request.granted is not None and request.generation == grant.generation:
            return
        if (before := self.processes.get(request.replica)) is not None:
            before.streams.pop(request.name, None)
        request.granted, request.generation, request.replica = self.now, grant.generation, grant.replica
        process = self.processes.get(grant.replica)
        if process is None or process.state != "ready":
            if self.is_gentle:
                self.crimes.append(f"{grant.request} was granted to {grant.replica}, which does not serve")
            self.at(self.now + 0.05, lambda: self._finish(request))
            return
        process.streams[request.name] = request
        request.width = len(grant.slots)
        slots = process.slots
        used = sum(each.width for each in process.streams.values())
        if used > slots and self.is_gentle:
            self.crimes.append(f"{process.uid} runs {used} sequences on {slots} slots")
        if self.faults.engine_hangs and self.random.random() < self.faults.engine_hangs:
            self.tell(ReplicaSuspected(process.uid))
        self.at(self.now + request.service_s, lambda: self._finish(request))

    def _finish(self, request: Request, tell: bool = True) -> None:
        if request.done:
            return
        request.done = True
        if request.then is not None:
            self.at(self.now, request.then)
        process = self.processes.get(request.replica)
        if process is not None:
            process.streams.pop(request.name, None)
        lost = self.faults.loses and self.random.random() < self.faults.loses
        if tell and not lost and request.granted is not None and request.holder not in self.dead_holders:
            self.tell(LeaseReleased(request.name, request.generation))

    def announce_holders(self) -> None:
        """Every holder says what it has. It keeps its messages in order, so this one is not late."""
        for holder in sorted({each.holder for each in self.requests.values()} - self.dead_holders):
            has = [each for each in self.requests.values() if each.holder == holder and not each.done]
            held = tuple((each.name, each.generation) for each in has if each.granted is not None)
            waiting = tuple(each.name for each in has if each.granted is None)
            self.post(HolderAnnounced(holder, held, waiting))

    # --- Ray Serve ----------------------------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        if isinstance(command, Grant):
            self._granted(command)
        elif isinstance(command, Reject):
            request = self.requests[command.request]
            if command.error == "MemoryBudgetExceeded" and self.memory_mib:
                seen = self.scheduler.model(request.model)  # type: ignore[attr-defined]
                if seen is not None and seen.ready:
                    self.crimes.append(f"{request.name} is refused, for {request.model}, which serves, is too large")
            # Not by its own deadline, but since a load has failed.
            if command.error == "BackendTimeout" and "retry_after" in command.extras and self.is_prompt:
                self.crimes.append(f"{request.name} waited for a start of {request.model} that could not be made")
            request.rejected = command.error
            request.done = True
            if request.then is not None:
                self.at(self.now, request.then)
        elif isinstance(command, SetDesired):
            self.desired[command.model] = command.replicas
            self.at(self.now + self.loop_s, lambda: self._reconcile(command.model))
        elif isinstance(command, LoadEngine):
            self._load(command)
        elif isinstance(command, UnloadEngine):
            self._unload(command)
        elif isinstance(command, SleepEngine):
            self._sleep(command)
        elif isinstance(command, WakeEngine):
            self._wakes(command)
        elif isinstance(command, EndReplica):
            process = self.processes.get(command.replica)
            if process is not None:
                self._die(process)
        elif isinstance(command, RestartEngine):
            process = self.processes.get(command.replica)
            if process is not None:
                self.at(self.now + 0.05, lambda: self._engine_dies(process))

    def _running(self, model: str) -> list[Process]:
        return [each for each in self.processes.values() if each.model == model and each.state != "stopping"]

    def _reconcile(self, model: str) -> None:
        """Serve's control loop: start what is missing, stop the newest of what is too much."""
        running = self._running(model)
        for _ in range(self.desired.get(model, 0) - len(running)):
            number = next(self.numbers)
            process = Process(f"{model}#{number}", model, "", number, self._load_time(model))
            self.processes[process.uid] = process
            if self.faults.never_starts and self.random.random() < self.faults.never_starts:
                continue
            self._try_start(process)
        for _ in range(len(running) - self.desired.get(model, 0)):
            victim = self.random.choice(self._may_stop(running))
            if self.faults.wrong_victim and self.random.random() < self.faults.wrong_victim:
                victim = self.random.choice(running)
            running.remove(victim)
            self._stop(victim)

    def _may_stop(self, running: list[Process]) -> list[Process]:
        """Of which Serve stops one: those that do not run yet, or by its own rule."""
        starting = [each for each in running if each.state in ("pending", "starting")]
        heads = (node.name for node in self.spec.nodes.values() if node.is_head)
        everywhere = self.others + Counter(
            each.node for each in self.processes.values() if each.state not in ("pending", "starting", "stopping")
        )
        return starting or serve.may_stop(running, everywhere, next(heads, None))

    def _load_time(self, model: str) -> float:
        base = self.load_s if isinstance(self.load_s, float | int) else self.load_s[model]
        spread = self.faults.load_spread
        return base * self.random.uniform(1.0 - spread, 1.0 + spread) if spread else base

    def _try_start(self, process: Process) -> None:
        """Ray starts a process where there is room for it, sooner or later."""
        if process.state != "pending":
            return
        choices = self._choices(process.model)
        if not choices:
            self.at(self.now + self.loop_s, lambda: self._try_start(process))
            return
        process.node = self.random.choice(list(choices)) if len(choices) > 1 else next(iter(choices))
        process.booked = choices[process.node]
        process.state = "starting"
        self.at(self.now + self.start_s, lambda: self._started(process))

    def _choices(self, model: str) -> dict[str, tuple[int, ...]]:
        """Where Ray may start a process. Where replicas stay, they take next to nothing of its books."""
        if self.spec.max_asleep != 0:
            return dict.fromkeys(self.spec.nodes, ())
        there = [each for each in self.processes.values() if each.node]
        return ray.choices(self.spec.models[model], self.spec.nodes, there, self.spec.models)

    def _started(self, process: Process) -> None:
        if process.state != "starting":
            return
        self.swaps += 1
        process.state = "waiting"
        process.number = next(self.numbers)
        started = ReplicaStarted(process.model, process.uid, process.node, float(process.number), booked=process.booked)
        self.tell(started, process)
        if self.faults.dies_after_s:
            self.at(self.now + self.random.expovariate(1.0 / self.faults.dies_after_s), lambda: self._die(process))

    def _load(self, order: LoadEngine) -> None:
        """The order to load reaches its replica, which may have died or been stopped meanwhile."""
        process = self.processes.get(order.replica)
        if process is None or process.state not in ("waiting", "failed", "asleep", "waking", "falling asleep"):
            return
        if process.state == "asleep" and self.is_gentle:
            self.crimes.append(f"{process.uid} is to load, and has an engine that sleeps")
        process.state, process.rests = "loading", False
        process.turn += 1
        process.devices = order.devices
        process.slots = self.spec.models[process.model].slots
        process.revision = self.spec.models[process.model].revision
        self._check_devices(process)
        if self.faults.load_hangs and self.random.random() < self.faults.load_hangs:
            return
        if self.faults.load_fails and self.random.random() < self.faults.load_fails:
            self.at(self.now + process.load_s * 0.7, lambda: self._failed(process))
            return
        self.at(self.now + process.load_s, lambda: self._ready(process))
        if self.faults.engine_dies_after_s:
            after = self.random.expovariate(1.0 / self.faults.engine_dies_after_s)
            self.at(self.now + after, lambda: self._engine_dies(process))

    def _unload(self, order: UnloadEngine) -> None:
        """The order to end its engine reaches a replica; it may hang over it."""
        process = self.processes.get(order.replica)
        busy = ("waiting", "loading", "ready", "failed", "asleep", "waking", "falling asleep")
        if process is None or process.state not in busy:
            return
        if process.streams and self.is_gentle:
            self.cut.append(f"{process.uid} unloaded with {len(process.streams)} streams")
        process.state = "unloading"
        if self.faults.unload_hangs and self.random.random() < self.faults.unload_hangs:
            return
        self.at(self.now + 0.02, lambda: self._unloaded(process))

    def _unloaded(self, process: Process) -> None:
        if process.state == "unloading":
            for request in list(process.streams.values()):
                self._finish(request)
            process.state, process.devices = "waiting", ()
            self.tell(EngineUnloaded(process.uid), process)

    def _sleep(self, order: SleepEngine) -> None:
        """The order to sleep reaches a replica: its engine does, or ends, or hangs over it."""
        process = self.processes.get(order.replica)
        if process is None or process.state not in ("waiting", "loading", "ready", "failed"):
            return
        if process.streams and self.is_gentle:
            self.cut.append(f"{process.uid} put to sleep with {len(process.streams)} streams")
        fails = process.state != "ready" or (self.faults.sleep_fails and self.random.random() < self.faults.sleep_fails)
        process.state, process.turn = "unloading" if fails else "falling asleep", process.turn + 1
        if self.faults.sleep_hangs and self.random.random() < self.faults.sleep_hangs:
            return
        turn = process.turn
        self.at(self.now + 0.1, lambda: self._unloaded(process) if fails else self._slept(process, turn))

    def _slept(self, process: Process, turn: int) -> None:
        if process.state != "falling asleep" or process.turn != turn:
            return
        for request in list(process.streams.values()):
            self._finish(request)
        process.state, process.rests = "asleep", True
        self.tell(EngineAsleep(process.uid, *self.asleep_mib.get(process.model, (0, 0))), process)
        if self.faults.engine_dies_after_s:
            after = self.random.expovariate(0.3 / self.faults.engine_dies_after_s)
            self.at(self.now + after, lambda: self._dies_asleep(process, turn))

    def _dies_asleep(self, process: Process, turn: int) -> None:
        if process.state == "asleep" and process.turn == turn:
            process.state, process.devices = "waiting", ()
            self.tell(EngineUnloaded(process.uid), process)

    def _wakes(self, order: WakeEngine) -> None:
        """The order to wake reaches a replica whose engine sleeps, or has died meanwhile."""
        process = self.processes.get(order.replica)
        if process is None or process.state not in ("waiting", "failed", "asleep"):
            return
        if process.state != "asleep":
            self.tell(ReplicaFailed(process.uid, "the engine that slept is gone"), process)
            return
        if order.devices != process.devices and not self.restarted:
            self.crimes.append(f"{process.uid} is to wake on {order.devices}, and sleeps on {process.devices}")
        process.state, process.turn, process.rests = "waking", process.turn + 1, False
        self._check_devices(process)
        turn = process.turn
        if self.faults.wake_hangs and self.random.random() < self.faults.wake_hangs:
            return
        fails = self.faults.wake_fails and self.random.random() < self.faults.wake_fails
        took = process.load_s / 5
        self.at(self.now + took, lambda: self._woken(process, turn, bool(fails)))

    def _woken(self, process: Process, turn: int, fails: bool) -> None:
        if process.state != "waking" or process.turn != turn:
            return
        if fails:
            process.state = "failed"
            self._free_devices(process)
            self.tell(ReplicaFailed(process.uid, "it does not wake"), process)
        else:
            process.state = "ready"
            self.tell(self._is_ready(process), process)

    def _check_devices(self, process: Process) -> None:
        """No device is used twice, and no two of a group that keeps apart meet. A restarted ledger may guess wrong."""
        if self.restarted or not process.devices:
            return
        spec = self.spec.models[process.model]
        for index in process.devices:
            here = [
                self.spec.models[each.model]
                for each in self.processes.values()
                if each.node == process.node and index in each.devices and not each.rests
            ]
            if sum(min(1.0, each.num_gpus) for each in here) > 1.0 + 1e-9:
                self.crimes.append(f"device {index} of {process.node} is given out twice, to {process.uid} at last")
            apart = spec.group and not spec.group_share
            if any(each.group == spec.group and each.name != spec.name for each in here if apart):
                self.crimes.append(f"{process.uid} meets its group on device {index} of {process.node}")
        if spec.devices and not set(process.devices) <= set(map(int, spec.devices)):
            self.crimes.append(f"{process.uid} is told to load on {process.devices}, and may on {spec.devices} only")

    def _engine_dies(self, process: Process) -> None:
        """The engine's own process dies, with its streams; the replica goes on."""
        if process.state not in ("loading", "ready"):
            return
        process.state = "waiting"
        self._free_devices(process)
        for request in list(process.streams.values()):
            self._finish(request)
        self.tell(EngineDied(process.uid, "it crashed"), process)

    def _failed(self, process: Process) -> None:
        if process.state == "loading":
            process.state = "failed"
            self._free_devices(process)
            self.tell(ReplicaFailed(process.uid, "the engine says no"), process)

    def _free_devices(self, process: Process) -> None:
        """Its engine is gone; where it goes with its engine, Ray keeps its share for it."""
        if self.spec.max_asleep != 0:
            process.devices = ()

    def _ready(self, process: Process) -> None:
        if process.state == "loading":
            process.state = "ready"
            self.tell(self._is_ready(process), process)

    def _is_ready(self, process: Process) -> ReplicaReady:
        measured = self.memory_mib.get(process.model)
        devices = tuple(map(str, process.devices))
        return ReplicaReady(process.uid, measured, None, devices, process.slots, process.revision)

    def _stop(self, process: Process) -> None:
        if process.state == "pending":
            del self.processes[process.uid]
            process.state = "dead"
            return
        if process.streams and self.is_gentle:
            self.cut.append(f"{process.uid} was stopped with {len(process.streams)} streams")
        process.before, process.state = process.state, "stopping"
        if process.before != "starting":
            self.tell(ReplicaStopping(process.uid), process)
        self.at(self.now + self.stop_s, lambda: self._stop_when_empty(process))

    def _stop_when_empty(self, process: Process) -> None:
        """Serve's grace period: what runs may finish."""
        if process.streams:
            self.at(self.now + self.loop_s, lambda: self._stop_when_empty(process))
        else:
            self._die(process)

    def _die(self, process: Process) -> None:
        if self.processes.pop(process.uid, None) is None:
            return
        for request in list(process.streams.values()):
            self._finish(request)
        asked = process.state == "stopping"
        process.state = "dead"
        self.tell(ReplicaGone(process.uid), process)
        if not asked:
            self.at(self.now + self.loop_s, lambda: self._reconcile(process.model))

    # --- a restart of the ledger --------------------------------------------------------------------------------

    def restart(self, make: Callable[[float], Any]) -> None:
        """The ledger is killed and comes back empty; everybody announces what is there."""
        self.scheduler = make(self.now)
        self.restarted = True
        self.waking = None
        for process in sorted(self.processes.values(), key=lambda each: self.random.random()):
            stops = process.state == "stopping"
            state = process.before if stops else process.state
            if state != "pending" and not (stops and state == "starting"):
                loads = state in ("loading", "waking", "ready", "failed")
                ends = state in ("unloading", "falling asleep")
                asleep = self.asleep_mib.get(process.model, (0, 0)) if state == "asleep" else None
                devices = process.devices if loads or ends or asleep is not None else ()
                told = (process.model, process.uid, process.node, float(process.number), loads, devices, ends)
                self.tell(ReplicaStarted(*told, stops, process.booked, 100, asleep), process)
                if state == "ready":
                    self.tell(self._is_ready(process), process)
                elif state == "failed":
                    self.tell(ReplicaFailed(process.uid, "the engine said no"), process)
        for request in self.requests.values():
            if request.done or request.holder in self.dead_holders:
                continue
            if request.granted is None:
                deadline = self.now + 1e6
                name, holder, model, priority = request.name, request.holder, request.model, request.priority
                self.tell(RequestArrived(name, holder, model, priority, deadline, slots=request.slots))
            else:
                self.tell(
                    LeaseReannounced(
                        request.name,
                        request.holder,
                        request.model,
                        request.replica,
                        request.generation,
                        slots=request.width,
                    )
                )
        self._wake_later()
