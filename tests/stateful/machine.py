"""The ledger beside a small model of the world, driven by Hypothesis.

Chance alone seldom drains a replica that holds a lease while somebody else comes, and just there are the bugs. So a
rule of its own (`lead`) walks a model's replica along the ledger's own transition table to a state that was drawn, and
the other rules do what they like from there. Illegal events have rules of their own, which demand that nothing happens.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.ledger.events import (
    ConfigChanged,
    EngineDied,
    Event,
    HolderAnnounced,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    NodesChanged,
    Reject,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    ReplicaSuspected,
    RequestArrived,
    RequestCancelled,
    Ticked,
    UnloadRequested,
)
from cluster.ledger.states import TRANSITIONS, Cause, ReplicaState
from tests.stateful.outside import ASLEEP, LOADING, MODELS, READY, SPEC, STOPPING, UNLOADING, Outside, Seen

# What a process can do by itself, and the event by which the ledger hears of it.
BY_ITSELF = (Cause.LOADED, Cause.FAILED, Cause.GONE, Cause.ENGINE_DIED, Cause.UNLOADED, Cause.SLEPT)
PAUSES = (0.0, 0.0, 0.1, 1.0, 4.0, 15.0)
SHORT = PAUSES[:4]


def path(begin: ReplicaState, end: ReplicaState) -> list[Cause]:
    """The shortest way through the transition table."""
    ways: deque[tuple[ReplicaState, list[Cause]]] = deque([(begin, [])])
    while True:
        state, way = ways.popleft()
        if state is end:
            return way
        ways.extend((after, [*way, cause]) for (before, cause), after in TRANSITIONS.items() if before is state)


class LedgerMachine(RuleBasedStateMachine):
    """Legal events in any order, illegal ones in between, and everything that must be true after each."""

    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.out = Outside()

    @initialize(
        max_asleep=st.sampled_from([0, 0, None, 1]), cluster=st.sampled_from(["one", "one", "one", "head", "flat"])
    )
    def begin(self, max_asleep: int | None, cluster: str) -> None:
        self.out = Outside(max_asleep, cluster)

    def teardown(self) -> None:
        logging.disable(logging.NOTSET)

    # --- requests -----------------------------------------------------------------------------------------------

    @rule(
        model=st.sampled_from([*MODELS, "nobody"]),
        priority=st.integers(1, 3),
        holder=st.sampled_from(["h1", "h2", "h3"]),
        timeout=st.sampled_from([3.0, 30.0, 300.0]),
        keep_alive=st.sampled_from([None, None, None, 0.0, 2.0]),
        count=st.sampled_from([1, 1, 1, 4]),
        slots=st.sampled_from([1, 1, 1, 2, 3]),
        pause=st.sampled_from(PAUSES),
    )
    def arrive(
        self,
        model: str,
        priority: int,
        holder: str,
        timeout: float,
        keep_alive: float | None,
        count: int,
        slots: int,
        pause: float,
    ) -> None:
        self.out.pass_time(pause)
        for _ in range(count):
            commands = self.out.send(model, priority, holder, timeout, keep_alive, slots)
            if model == "nobody" or holder in self.out.dead:
                assert [type(each) for each in commands] == [Reject], f"not refused at once: {commands}"

    @rule(
        model=st.sampled_from(["A", "B", "C"]),
        classes=st.lists(st.integers(1, 3), min_size=3, max_size=4),
        widths=st.lists(st.sampled_from([1, 1, 2]), min_size=4, max_size=4),
        step=st.sampled_from([0.0, 0.5, 2.0]),
    )
    def line_up(self, model: str, classes: list[int], widths: list[int], step: float) -> None:
        """A line forms, wide ones in it, and one place after the other is given back."""
        for priority, slots in zip(classes, widths, strict=False):
            self.out.pass_time(step)
            self.out.send(model, priority, slots=slots)
        for sent in [each for each in self.out.leased() if each.model == model]:
            self.out.pass_time(step)
            if not sent.answered:
                self.out.release(sent)

    @precondition(lambda self: self.out.waiting() or self.out.leased())
    @rule(data=st.data())
    def arrive_again(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from(self.out.waiting() + self.out.leased()))
        commands = self.out.tell(self.out.arrival(sent))
        if sent.grant is not None:
            assert sent.grant in commands, "a lease was not told again"

    @precondition(lambda self: self.out.leaving())
    @rule(data=st.data())
    def ask_for_what_leaves(self, data: st.DataObject) -> None:
        """Also for what drains and has free slots: nobody may get those."""
        self.out.send(data.draw(st.sampled_from(self.out.leaving())).model, 2)

    @precondition(lambda self: self.out.leased())
    @rule(data=st.data(), pause=st.sampled_from(PAUSES))
    def release(self, data: st.DataObject, pause: float) -> None:
        self.out.pass_time(pause)
        self.out.release(data.draw(st.sampled_from(self.out.leased())))

    @precondition(lambda self: self.out.waiting() or self.out.leased())
    @rule(data=st.data(), pause=st.sampled_from(PAUSES))
    def cancel(self, data: st.DataObject, pause: float) -> None:
        # Its deadline may come at this very moment: then it is refused, and there is nothing to cancel.
        sent = data.draw(st.sampled_from(self.out.waiting() + self.out.leased()))
        self.out.pass_time(pause)
        if not sent.answered:
            self.out.cancel(sent)

    @precondition(lambda self: self.out.waiting() or self.out.leased())
    @rule(data=st.data(), pause=st.sampled_from(SHORT))
    def a_holder_announces_itself(self, data: st.DataObject, pause: float) -> None:
        """Some of its releases and cancellations were lost, and some of its grants are still on their way."""
        self.out.pass_time(pause)
        has = self.out.waiting() + self.out.leased()
        if not has:
            return
        holder = data.draw(st.sampled_from(sorted({each.holder for each in has})))
        names = st.sampled_from(sorted(each.name for each in has if each.holder == holder))
        self.out.lose_settles(holder, data.draw(st.sets(names)), data.draw(st.sets(names)))

    @rule(data=st.data(), model=st.sampled_from(["A", "B", "C"]))
    def holder_dies(self, data: st.DataObject, model: str) -> None:
        """One that holds or awaits something; the first never dies."""
        self.out.tell(Ticked())
        busy = {each.holder for each in self.out.waiting() + self.out.leased()} - {"h1"}
        holder = data.draw(st.sampled_from(sorted(busy) or ["h2", "h3"]))
        if not busy and holder not in self.out.dead:
            self.out.send(model, 2, holder)
        self.out.dead.add(holder)
        for sent in self.out.waiting() + self.out.leased():
            if sent.holder == holder:
                self.out.end(sent)
        self.out.tell(HolderDied(holder))

    # --- processes ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.out.missing())
    @rule(data=st.data(), pause=st.sampled_from(PAUSES))
    def serve_starts(self, data: st.DataObject, pause: float) -> None:
        self.out.pass_time(pause)
        if missing := self.out.missing():
            self.out.announce(data.draw(st.sampled_from(missing)))

    @precondition(lambda self: self.out.loading())
    @rule(data=st.data(), pause=st.sampled_from(SHORT))
    def loads(self, data: st.DataObject, pause: float) -> None:
        """The usual course of things, drawn more often than by chance."""
        self.out.pass_time(pause)
        if loading := self.out.loading():
            self.out.act(data.draw(st.sampled_from(loading)), Cause.LOADED)

    @rule(pause=st.sampled_from(SHORT))
    def serve_does_its_work(self, pause: float) -> None:
        self.out.pass_time(pause)
        self.out.serve_does_its_work()

    @precondition(lambda self: self.out.seen)
    @rule(data=st.data(), pause=st.sampled_from(PAUSES))
    def acts(self, data: st.DataObject, pause: float) -> None:
        """A process does anything that the transition table allows."""
        self.out.pass_time(pause)
        seen = data.draw(st.sampled_from(list(self.out.seen.values())))
        self.out.act(seen, data.draw(st.sampled_from(self.out.able(seen, BY_ITSELF))))

    @precondition(lambda self: any(each.has_engine and not each.is_restarting for each in self.out.seen.values()))
    @rule(data=st.data(), dies=st.booleans())
    def an_engine_hangs(self, data: st.DataObject, dies: bool) -> None:
        """A holder notices; the engine is killed, soon or when its replica gets to it."""
        self.out.tell(Ticked())
        hung = [each for each in self.out.seen.values() if each.has_engine and not each.is_restarting]
        hung = [each for each in hung if self.out.inside(each).may_hold_leases]
        if hung:
            seen = data.draw(st.sampled_from(hung))
            self.out.suspect(seen)
            if dies:
                self.out.act(seen, Cause.ENGINE_DIED)

    @precondition(lambda self: self.out.too_many())
    @rule(data=st.data(), pause=st.sampled_from(PAUSES))
    def serve_stops(self, data: st.DataObject, pause: float) -> None:
        self.out.pass_time(pause)
        if models := self.out.too_many():
            self.out.stop_one(data.draw(st.sampled_from(models)))

    @precondition(lambda self: self.out.seen)
    @rule(data=st.data(), pause=st.sampled_from(PAUSES))
    def serve_tells_to_stop(self, data: st.DataObject, pause: float) -> None:
        """One that it was asked to stop; or any, for reasons of its own."""
        self.out.pass_time(pause)
        newest = [each for each in map(self.out.newest, self.out.too_many()) if each is not None]
        told = data.draw(st.sampled_from(newest or list(self.out.seen.values())))
        if not told.is_told:
            self.out.tell_to_stop(told)

    @rule(slots=st.sampled_from([1, 2, 4]))
    def the_configuration_changes(self, slots: int) -> None:
        self.out.tell(Ticked())
        self.out.configure(slots)
        self.out.tell(ConfigChanged(self.out.spec))

    @rule(model=st.sampled_from(["A", "B", "D"]))
    def unasked_start(self, model: str) -> None:
        self.out.unasked = True
        self.out.announce(model)

    @precondition(lambda self: self.out.stays)
    @rule(pause=st.sampled_from(SHORT))
    def others_come_while_an_engine_sleeps(self, pause: float) -> None:
        """A falls asleep, B takes devices, and A is asked for while another device than its own is free."""
        out = self.out
        self.lead("A", ReplicaState.READY, "h1")
        for sent in [each for each in out.leased() if not each.answered]:
            out.release(sent)
        out.pass_time(MODELS["A"].idle_timeout_s)
        for seen in out.alive("A"):
            if seen.falls_asleep and not seen.is_told:
                out.act(seen, Cause.SLEPT)
        beds = {(each.node, *each.sleeps_on) for each in out.alive("A") if each.sleeps_on}
        for _ in range(2):
            out.send("B", 1)
        out.serve_does_its_work()
        for sent in [each for each in out.leased() if each.model == "B"]:
            seen = out.seen[sent.grant.replica] if sent.grant else None
            if seen is not None and (seen.node, *seen.devices) not in beds:
                out.release(sent)
        out.pass_time(pause)
        out.send("A", 1)

    # --- along the transition table -----------------------------------------------------------------------------

    @rule(
        model=st.sampled_from("AABCP"),
        end=st.sampled_from([each for each in ReplicaState if each]),
        holder=st.sampled_from(["h1", "h2"]),
    )
    def lead(self, model: str, end: ReplicaState, holder: str) -> None:
        """Bring a replica of a model into a state, as far as the pool lets us."""
        holder = "h1" if holder in self.out.dead else holder
        alive = self.out.alive(model)
        for cause in path(self.out.inside(alive[0]) if alive else ReplicaState.COLD, end):
            self._bring_about(model, cause, holder)

    def _bring_about(self, model: str, cause: Cause, holder: str) -> None:
        """What the outside does so that the ledger makes this transition; it may have reasons not to."""
        out = self.out
        alive = out.alive(model)
        if cause is Cause.PLACED and MODELS[model].manual:
            out.load(model, 1)
        elif cause is Cause.PLACED:
            out.send(model, 2, holder)
        elif cause is Cause.QUIESCED:
            # Somebody is inside, somebody else waits for the room, and the bound is reached.
            if not any(each.leases for each in alive):
                out.send(model, 2, holder)
            out.send("A" if model == "C" else "C", 1)
            out.pass_time(SPEC.bound_s[0])
        elif cause is Cause.REOPENED:
            for sent in [each for each in out.waiting() if each.model != model]:
                out.cancel(sent)
        elif cause is Cause.EMPTIED:
            for sent in [each for each in out.leased() if each.grant and each.grant.replica.startswith(model)]:
                if not sent.answered:
                    out.release(sent)
        elif cause is Cause.WITHDRAWN:
            out.unload(model)
        else:
            self._by_itself(model, cause)

    def _by_itself(self, model: str, cause: Cause) -> None:
        if not self.out.alive(model) and model in self.out.missing():
            self.out.announce(model)
        if cause in (Cause.ANNOUNCED, Cause.ASSIGNED, Cause.DEMOTED, Cause.DISMISSED):
            # The ledger's own affair.
            return
        able: list[Seen] = [each for each in self.out.alive(model) if self.out.able(each, (cause,))]
        if able:
            self.out.act(able[0], cause)

    # --- operators and time -------------------------------------------------------------------------------------

    @rule(pause=st.sampled_from([0.1, 1.0, 5.0, 40.0]))
    def tick(self, pause: float) -> None:
        self.out.pass_time(pause)

    @rule()
    def tick_when_due(self) -> None:
        due = self.out.ledger.next_deadline()
        # Not as far as a drain's own timeout, an hour ahead: it ends leases without a word to the outside.
        if due is not None and due < self.out.now + 1000.0:
            self.out.pass_time(max(0.0, due - self.out.now))
            later = self.out.ledger.next_deadline()
            assert later is None or later > self.out.now, f"a tick at {self.out.now} leaves {later}"

    @rule(model=st.sampled_from(sorted(MODELS)), replicas=st.integers(0, 2))
    def load(self, model: str, replicas: int) -> None:
        self.out.load(model, replicas)

    @rule(model=st.sampled_from(sorted(MODELS)))
    def unload(self, model: str) -> None:
        self.out.unload(model)

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        """Liveness: when everybody does his part, everybody who waits is served within the bounds and a few loads."""
        # The pinned one would keep half a device from C, which takes them all.
        self.out.unload("P")
        for _ in range(120):
            if not self.out.waiting():
                break
            self.out.serve_does_its_work()
            for sent in self.out.leased():
                if not sent.answered:
                    self.out.release(sent)
            self.out.pass_time(0.5)
        assert not self.out.waiting(), f"they wait for ever: {self.out.waiting()}"

    # --- a new life of the ledger -------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        holders=st.sets(st.sampled_from(["h2", "h3"])),
        pause=st.sampled_from([0.0, 0.1, 0.5]),
        configured=st.booleans(),
        slots=st.sampled_from([None, 1, 4]),
        newcomers=st.sampled_from([0, 0, 4]),
    )
    def ledger_restarts(
        self,
        data: st.DataObject,
        holders: set[str],
        pause: float,
        configured: bool,
        slots: int | None,
        newcomers: int,
    ) -> None:
        """All is announced anew, in any order; some have died meanwhile. No lease is lost, and none granted twice.

        The new ledger need not know the newest configuration: it comes among the rest.
        """
        self.out.tell(Ticked())
        dying = data.draw(st.sets(st.sampled_from(sorted(self.out.seen)))) if self.out.seen else set()
        self.out.lose_the_ledger(configured, slots)
        announced = self.out.announcements(dying, holders)
        events = data.draw(st.permutations(announced if configured else [*announced, ConfigChanged(self.out.spec)]))
        for index, event in enumerate(events):
            if index == len(events) // 2:
                self.out.pass_time(pause)
                for _ in range(newcomers):
                    self.out.send("D", 2)
            if isinstance(event, RequestArrived) and self.out.sent[event.request].deadline <= self.out.now:
                self.out.sent[event.request].answered = True
                continue
            self.out.hear(event)
        self.out.dead |= holders
        self.out.close_the_window()

    # --- what must change nothing -------------------------------------------------------------------------------

    @rule(
        event=st.sampled_from(
            [
                RequestCancelled("unknown"),
                LeaseReleased("unknown", 1),
                ReplicaReady("dead"),
                ReplicaFailed("unknown", "why"),
                ReplicaStarted("nobody", "x#1", "n"),
                ReplicaStarted("A", "x#2", "n", float("nan")),
                EngineDied("dead", "why"),
                ReplicaSuspected("unknown"),
                HolderAnnounced("nobody", (), ("unknown",)),
                HolderAnnounced("h1", ("r1",), ()),  # type: ignore[arg-type]
                RequestArrived("bad", "h1", "A", 1, 9.0, None, 0),
                UnloadRequested("nobody"),
                HolderDied("nobody"),
                RequestArrived("", "h1", "A", 7, 5.0),
                RequestArrived("bad", "h1", "A", 1, float("nan")),
                RequestArrived(["x"], "h1", "A", 1, 9.0),  # type: ignore[arg-type]
                LeaseReannounced("bad", "h1", "A", "x#1", 1, 9),
                ConfigChanged(None),  # type: ignore[arg-type]
                NodesChanged({"n": 3}),  # type: ignore[dict-item]
                LeaseReleased("unknown", "1"),  # type: ignore[arg-type]
                object(),
                None,
            ]
        )
    )
    def illegal(self, event: Any) -> None:
        self._unchanged(event)

    @precondition(lambda self: self.out.leased())
    @rule(data=st.data(), shift=st.sampled_from([-1, 1, 1000]))
    def stale_release(self, data: st.DataObject, shift: int) -> None:
        sent = data.draw(st.sampled_from(self.out.leased()))
        assert sent.grant is not None
        self._unchanged(LeaseReleased(sent.name, sent.grant.generation + shift))

    @precondition(lambda self: any(each.answered and each.grant for each in self.out.sent.values()))
    @rule(data=st.data())
    def release_twice(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from([each for each in self.out.sent.values() if each.answered and each.grant]))
        assert sent.grant is not None
        self._unchanged(LeaseReleased(sent.name, sent.grant.generation))

    def _unchanged(self, event: Event) -> None:
        self.out.tell(Ticked())
        before = self.out.ledger.snapshot()
        assert self.out.tell(event) == [], f"{event!r} had an effect"
        assert self.out.ledger.snapshot() == before, f"{event!r} changed something"

    # --- after every step ---------------------------------------------------------------------------------------

    @invariant()
    def the_inside_is_sound(self) -> None:
        self.out.ledger.check()

    @invariant()
    def both_sides_agree(self) -> None:
        out = self.out
        state, leased, waiting = out.ledger.snapshot(), len(out.leased()), len(out.waiting())
        assert state.leases == leased, f"{state.leases} leases inside, {leased} outside"
        assert state.queued == waiting, f"{state.queued} wait inside, {waiting} outside"
        assert state.submitted == state.queued + state.leases + state.finished + state.rejected
        assert {each.replica for each in state.replicas} - {None} == set(out.seen), "not the same processes"
        for model in MODELS:
            ages = [each.replica for each in state.replicas if each.model == model and each.replica]
            assert ages == [each.uid for each in out.alive(model)], f"{ages} are not in the order of their age"
        assert out.ledger.desired == out.desired, f"{out.ledger.desired} inside, {out.desired} outside"

    @invariant()
    def every_wait_has_an_end(self) -> None:
        if waiting := self.out.waiting():
            first, due = min(each.deadline for each in waiting), self.out.ledger.next_deadline()
            assert due is not None, f"a request gives up at {first}, and the ledger never wakes"
            assert due <= first, f"a request gives up at {first}, the ledger wakes at {due}"
            late = [each for each in waiting if each.deadline <= self.out.now]
            assert not late, f"they wait beyond their deadline: {late}"

    @invariant()
    def nobody_waits_for_a_stream_beside_an_idle_model(self) -> None:
        """Where nothing starts or stops, and one model waits for a device, nobody else has an idle one to give."""
        out = self.out
        names = {each.model for each in out.waiting()}
        stopping = {STOPPING, UNLOADING} if out.stays else {STOPPING, ASLEEP}
        moving = {each.state for each in out.seen.values()} & {LOADING, *stopping}
        # On several nodes Serve may have to stop a busy one before an idle one.
        if (
            len(out.nodes) > 1
            or out.unasked
            or moving
            or out.missing()
            or len(names) != 1
            or not names <= {"A", "B", "D"}
        ):
            return
        (name,) = names
        resting = out.ledger.snapshot().models[name].backoff_until or 0.0
        if not out.alive(name) and resting <= out.now:
            idle = [each for each in map(out.newest, ("A", "B", "C")) if each and not each.leases]
            assert not [each for each in idle if each.state is READY], f"{name} waits beside {idle}"

    @invariant()
    def devices_are_not_overcommitted(self) -> None:
        out = self.out
        if out.unasked:
            return
        used = 0.0
        for model, spec in MODELS.items():
            if out.stays:
                # What an engine takes is its own from the order to load to its end, wherever replicas are.
                used += spec.num_gpus * sum(1 for each in out.alive(model) if each.devices)
                continue
            # Every process that lives takes its place, and every one that Serve has yet to start.
            wanted = [each for each in out.alive(model) if not each.is_asked]
            used += spec.num_gpus * (len(out.alive(model)) + max(0, out.desired[model] - len(wanted)))
        assert used <= out.gpus + 1e-9, f"{used} devices of {out.gpus} are taken"
