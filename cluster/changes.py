"""The pool's one change log: what happened, in order, for those who follow it (`GET /v1/admin/events`).

It holds the last `LIMIT` entries, numbered from 1 in each life of the ledger. Who has seen entry N is told what came
after it; who was away for too long, or in another life of the ledger, gets a snapshot and goes on from there. Watching
decides nothing, and costs the request path nothing: counts are compared now and then, while somebody follows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.ledger.events import ConfigChanged, ServerManifest, ServerSuspected
from cluster.ledger.snapshot import Brief, ServerRow, Snapshot
from cluster.ledger.transitions import Because, SwapBegun, Transition

if TYPE_CHECKING:
    from cluster.ledger.ledger import Ledger
    from cluster.metrics import Counts, Outcome

#: How many entries are kept. One is about half a kilobyte.
LIMIT = 10_000
#: How many entries one call brings at most.
BATCH = 1000
#: Leases and queues of a model get one entry each in so many seconds, however busy it is. In a pool of very many models
#: a look at all of them takes milliseconds: then it is taken more rarely, so that it is this part of the time at most.
COUNTS_PERIOD_S = 0.1
COUNTS_SHARE = 0.05
#: Clients choose their requests' ids, and the names of models that are not there; so many characters of one are kept.
LONGEST_TRACE = 128
LONGEST_MODEL = 256
#: Between two calls of a follower it still counts as one, for so many seconds.
FOLLOWER_PAUSE_S = 5.0
#: Of the requests that end within one period, so many get an entry each; the others are summed up in one.
REQUESTS_PERIOD_S = 0.5
REQUESTS_IN_PERIOD = 10
#: A follower who begins is shown so many entries of these kinds from before.
RECENT = 200
RECENT_KINDS = frozenset(("replica", "swap", "request", "config"))

#: A model of which nothing was told yet.
NOTHING = Brief("unloaded", 0, 0, (0, 0, 0), None)

_TO_REVIEW = frozenset((ServerManifest, ServerSuspected, ConfigChanged))


class Change(NamedTuple):
    """One entry. `time` is in seconds since 1970; `data` is plain and depends on `kind`:

    `replica`  from, to, cause, reason, because, record, node, devices: a transition (`ledger.transitions.Moved`)
    `model`    state, ready, last_error, remote, pinned, memory_mib, load_s, removed: a model as it stands now
    `queue`    queued, by_class, since_by_class, bound_at: who waits for a model, and since when (the ledger's clock)
    `lease`    leases, drain_s: how many requests a model runs; replicas: record, leases, used, slots of each with any
    `load`     progress: how much of a replica's load is done, 0.0 to 1.0
    `swap`     victims, reason, because: a model was promised their room
    `request`  one that ended: id, and the rest of `metrics.Outcome`; never what was asked or answered
    `requests` count, prompt_tokens, output_tokens: those that ended beyond what is told of one by one
    `server`   an external server as it stands now
    `config`   the pool's configuration changed
    """

    version: int
    time: float
    kind: str
    model: str | None
    replica: str | None
    data: dict[str, Any]


class Changes(NamedTuple):
    """What a follower is told. With a snapshot, all that it knew is void, and `changes` is empty.

    `version` is what it has seen now, to be named in the next call together with `epoch`. `recent` comes with a
    snapshot: what happened before it, for people to read.
    """

    epoch: str
    version: int
    snapshot: Snapshot | None
    changes: list[Change]
    recent: tuple[Change, ...] = ()


class ChangeLog:
    """The entries of one life of the ledger."""

    def __init__(self, epoch: str, limit: int = LIMIT) -> None:
        self.epoch = epoch
        self.version = 0
        self._entries: deque[Change] = deque(maxlen=limit)
        self._grown = asyncio.Event()

    def add(self, kind: str, model: str | None = None, replica: str | None = None, /, **data: Any) -> None:
        """Write an entry and wake all who wait for one."""
        self.version += 1
        self._entries.append(Change(self.version, time.time(), kind, model, replica, data))
        self._grown.set()
        self._grown = asyncio.Event()

    def after(self, epoch: str, version: int, limit: int = BATCH) -> list[Change] | None:
        """The first entries behind `version`; None if that is of another life, or some of them are gone."""
        missed = self.version - version
        if epoch != self.epoch or missed < 0 or missed > len(self._entries):
            return None
        start = len(self._entries) - missed
        return list(itertools.islice(self._entries, start, start + limit))

    def recent(self) -> tuple[Change, ...]:
        """The last entries that tell what happened, oldest first, without those that only count."""
        told = (each for each in reversed(self._entries) if each.kind in RECENT_KINDS)
        return tuple(itertools.islice(told, RECENT))[::-1]

    async def grown(self, version: int, timeout_s: float) -> None:
        """Wait until there is an entry behind `version`, at most so long."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.version <= version:
                    await self._grown.wait()
        except TimeoutError:
            return


class Watch:
    """Writes the change log of one ledger, and counts its transitions. To be told of every decision."""

    def __init__(
        self,
        ledger: Ledger,
        counts: Counts,
        log: ChangeLog | None = None,
        trace_of: Callable[[str], str] = lambda request: "",
    ) -> None:
        self.log = ChangeLog(ledger.epoch) if log is None else log
        self._ledger = ledger
        self._counts = counts
        self._trace_of = trace_of
        self._briefs: dict[str, Brief] = {}
        self._servers: dict[str, ServerRow] = {}
        self._followers = 0
        self._followed_until = 0.0
        self._review_due = False
        self._review_s = 0.0
        self._ended = 0
        self._untold = [0, 0, 0]

    def decided(self, event: Any) -> None:
        """The ledger has decided about an event. Cheap where nothing moved; never blocks."""
        transitions, kind = self._ledger.transitions, type(event)
        if transitions or kind in _TO_REVIEW:
            if kind is ConfigChanged:
                self.log.add("config")
            for each in transitions:
                self._changed(each)
            if kind in _TO_REVIEW:
                self.review()
            else:
                # What happens to one model changes no other, except for those who wait, and they are looked at soon.
                self._review({each.model for each in transitions})
                self._review_soon()
        elif self._followers or time.monotonic() < self._followed_until:
            self._review_soon()

    def progress(self, replica: str, fraction: float) -> None:
        """So much of a replica's load is done."""
        self.log.add("load", self._ledger.model_of(replica), replica, progress=round(fraction, 3))

    def ended(self, request: str, outcome: Outcome) -> None:
        """A request ended. A flood of them costs the log no more than a few entries a second."""
        self._ended += 1
        if self._ended == 1:
            asyncio.get_running_loop().call_later(REQUESTS_PERIOD_S, self._sum_up)
        if self._ended <= REQUESTS_IN_PERIOD:
            told = outcome._asdict()
            told["trace"] = outcome.trace[:LONGEST_TRACE]
            # A refused one names its model itself, at any length.
            self.log.add("request", told.pop("model")[:LONGEST_MODEL], None, id=request, **told)
            return
        untold = self._untold
        untold[0] += 1
        untold[1] += outcome.prompt_tokens or 0
        untold[2] += outcome.output_tokens or 0

    def _sum_up(self) -> None:
        (count, prompt_tokens, output_tokens), self._untold = self._untold, [0, 0, 0]
        self._ended = 0
        if count:
            self.log.add("requests", count=count, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    async def follow(
        self, epoch: str, version: int, timeout_s: float, limit: int, snapshot: Callable[[], Snapshot]
    ) -> Changes:
        """What came behind `version`; parks while there is nothing, at most `timeout_s`."""
        log = self.log
        found = log.after(epoch, version, limit)
        if found is None:
            # What the snapshot shows and what the log has told are the same.
            self.review()
            return Changes(log.epoch, log.version, snapshot(), [], log.recent())
        if not found:
            self._followers += 1
            self._review_soon()
            try:
                await log.grown(version, timeout_s)
            finally:
                self._followers -= 1
                self._followed_until = time.monotonic() + FOLLOWER_PAUSE_S
            # None if more came at once than the log holds: the next call learns of it.
            found = log.after(epoch, version, limit) or []
        return Changes(log.epoch, found[-1].version if found else version, None, found)

    def review(self) -> None:
        """Write what differs from what was last told of models, queues, leases and servers."""
        began = time.monotonic()
        self._review(None)
        self._review_servers()
        self._review_s = time.monotonic() - began

    def _review(self, models: Set[str] | None) -> None:
        """Of these models, or of all."""
        before, now = self._briefs, self._ledger.briefs(models)
        for name, brief in now.items():
            old = before.get(name, NOTHING)
            if brief == old and name in before:
                continue
            stands = _standing(brief)
            if stands != _standing(old) or name not in before:
                self.log.add("model", name, **stands, removed=False)
            if (brief.leases, brief.uses) != (old.leases, old.uses):
                uses = [each._asdict() for each in brief.uses]
                self.log.add("lease", name, leases=brief.leases, drain_s=brief.drain_s, replicas=uses)
            waits = _waiting(brief)
            if waits != _waiting(old):
                self.log.add("queue", name, **waits)
        for name in (before.keys() if models is None else models & before.keys()) - now.keys():
            self.log.add("model", name, **_standing(NOTHING), removed=True)
            del before[name]
        self._briefs |= now

    def _review_servers(self) -> None:
        before, now = self._servers, {row.url: row for row in self._ledger.servers()}
        for url, row in now.items():
            if row != before.get(url):
                told = {"available_models": list(row.available_models), "removed": False}
                self.log.add("server", row.current_model, None, **{**dataclasses.asdict(row), **told})
        for url in before.keys() - now.keys():
            self.log.add("server", url=url, removed=True)
        self._servers = now

    def _changed(self, transition: Transition) -> None:
        self._counts.moved(transition)
        if isinstance(transition, SwapBegun):
            told = {"reason": transition.reason, "because": self._plain(transition.because)}
            self.log.add("swap", transition.model, victims=list(transition.victims), **told)
            return
        moved = transition
        self.log.add(
            "replica",
            moved.model,
            moved.replica,
            **{"from": moved.before.name, "to": moved.after.name, "cause": moved.cause, "reason": moved.reason},
            because=self._plain(moved.because),
            record=moved.record,
            node=moved.node,
            devices=list(moved.devices),
        )

    def _plain(self, because: Because | None) -> dict[str, Any] | None:
        """`{rule, waiter, bound_in_s, cost_s, victims}`; None for what happened by itself.

        `request` is what the waiter's client calls it, where that is known.
        """
        if because is None:
            return None
        plain = {**because._asdict(), "victims": list(because.victims)}
        trace = self._trace_of(because.waiter) if because.waiter is not None else ""
        return {**plain, "request": trace[:LONGEST_TRACE]} if trace else plain

    def _review_soon(self) -> None:
        if not self._review_due:
            self._review_due = True
            pause_s = max(COUNTS_PERIOD_S, self._review_s / COUNTS_SHARE)
            asyncio.get_running_loop().call_later(pause_s, self._review_now)

    def _review_now(self) -> None:
        self._review_due = False
        self.review()


def _standing(brief: Brief) -> dict[str, Any]:
    keys = ("state", "ready", "last_error", "remote", "pinned", "memory_mib", "load_s")
    return {key: getattr(brief, key) for key in keys}


def _waiting(brief: Brief) -> dict[str, Any]:
    by_class = brief.queued_by_class
    waits = {"queued": sum(by_class), "by_class": list(by_class), "since_by_class": list(brief.since_by_class)}
    return {**waits, "bound_at": brief.bound_at}
