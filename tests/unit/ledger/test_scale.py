"""However large the pool, no event takes long: what is too much for one is left for the next, which are due at once."""

from __future__ import annotations

import random

import pytest

from cluster.ledger import placing, tree
from cluster.ledger.books import stops
from cluster.ledger.events import ConfigChanged, LeaseReleased, NodesChanged, ReplicaReady, ReplicaStarted, Ticked
from cluster.ledger.handlers import requests
from cluster.ledger.rules import eviction
from cluster.ledger.specs import NodeSpec, PoolSpec
from tests.unit.ledger.desk import Desk, model


def busy(desk: Desk, *names: str) -> None:
    for name in names:
        desk.arrive(f"{name}1", name)
        desk.boot(name, f"{name}#1")


def ticks(desk: Desk) -> list[list[str]]:
    """What every tick leads to that is due at once."""
    found = []
    while (due := desk.ledger.next_deadline()) is not None and due <= desk.now:
        found.append(desk.tell(Ticked()))
        assert len(found) < 10, "it comes to no end"
    return found


def test_many_deadlines_at_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_EXPIRED", 2)
    desk = Desk(model("A"))
    busy(desk, "A")
    for number in range(5):
        desk.arrive(f"r{number}", "A", timeout=10.0)
    refused = [desk.at(10.0), *ticks(desk)]
    assert refused == [[f"reject r{number} BackendTimeout" for number in two] for two in ((0, 1), (2, 3), (4,))]


def test_many_timers_at_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_TIMERS", 1)
    desk = Desk(model("A", idle_timeout_s=5.0), model("B", idle_timeout_s=5.0), gpus=2)
    busy(desk, "A", "B")
    desk.tell(*(LeaseReleased(name, desk.grants[name].generation) for name in ("A1", "B1")))
    stopped = [desk.at(5.0), *ticks(desk)]
    assert [words for words in stopped if words] == [["quiesce A#1", "desire A 0"], ["quiesce B#1", "desire B 0"]]


def test_who_waits_while_others_look_for_victims_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "MAX_LOOKED", 0)
    desk = Desk(*map(model, "ABCD"), gpus=2, bound_s=(9.0, 9.0, 9.0), load_prior_s=0.0, turn_swaps=0.0)
    busy(desk, "A", "B")
    desk.arrive("c", "C")
    desk.arrive("d", "D")
    drained = [desk.at(9.0), *ticks(desk)]
    assert [words for words in drained if words] == [["quiesce A#1"], ["quiesce B#1"]]


def test_what_became_idle_is_offered_in_the_next_event(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(*map(model, "ABC"), gpus=2)
    busy(desk, "A", "B")
    desk.arrive("c", "C")

    answers = [False, True, True]
    monkeypatch.setattr(placing, "has_looked_enough", lambda pool: answers.pop(0) if answers else False)
    assert desk.release("A1") == []
    assert answers == []
    assert desk.ledger.next_deadline() == desk.now
    assert ticks(desk) == [["quiesce A#1", "desire A 0"]]


def test_a_search_looks_at_other_machines_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "MAX_REPLICAS", 1)
    nodes = {name: NodeSpec(name, gpus=2, cpus=8.0) for name in "nmk"}
    desk = Desk(*map(model, "ABCDEF"), model("X"), nodes=nodes, bound_s=(9.0, 9.0, 9.0), load_prior_s=0.0)
    for name, node in zip("ABCDEF", "nnmmkk", strict=True):
        desk.arrive(f"{name}1", name)
        desk.boot(name, f"{name}#1", node)
    pool = desk.ledger._pool
    seen = [[node.name for node in eviction._nodes(pool)] for _ in range(3)]
    assert sorted(seen) == [["k"], ["m"], ["n"]]
    desk.arrive("x", "X")
    assert next(words for words in [desk.at(9.0), *ticks(desk)] if words)[0].startswith("quiesce")


def test_what_serve_stops_before_a_replica_is_what_may_go_before_it_or_before_those() -> None:
    """Found in one pass; step by step it is the same, in the same order."""
    rng = random.Random(3)
    for _ in range(200):
        nodes = {name: NodeSpec(name, gpus=8, cpus=8.0, is_head=name == "head") for name in ("head", "n", "m")}
        desk = Desk(model("A", max_replicas=8), nodes=nodes, recovering_until=9.0)
        for number in range(rng.randint(1, 7)):
            node, age = rng.choice(list(nodes)), rng.random()
            desk.tell(ReplicaStarted("A", f"A#{number}", node, age, loading=True), ReplicaReady(f"A#{number}"))
        book = desk.ledger._pool.book
        replicas = list(desk.ledger._pool.models["A"].replicas)
        for each in replicas:
            each.told_to_stop = rng.random() < 0.1
            each.uid = None if rng.random() < 0.1 else each.uid
        for replica in replicas:
            found = [replica]
            for later in found:
                found += [each for each in replicas if each not in found and stops.may_go_before(book, each, later)]
            assert stops.find_before(book, replica) == found[1:]


def test_a_busy_model_at_its_minimum_stays_until_the_bound() -> None:
    desk = Desk(model("A", min_replicas=1), model("B"), bound_s=(9.0, 9.0, 9.0), load_prior_s=0.0)
    desk.boot("A", "A#1")
    desk.arrive("a", "A")
    desk.arrive("b", "B")
    assert desk.at(8.9) == []
    assert desk.at(9.0) == ["quiesce A#1"]


def test_a_change_for_very_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "ABC"
    desk = Desk(*map(model, names), gpus=3)
    for name in names:
        desk.warm(name, f"{name}#1")
    monkeypatch.setattr(tree, "MAX_TOUCHED", 1)
    changed = {name: model(name, revision="2") for name in names}
    drained = [desk.tell(ConfigChanged(PoolSpec(models=changed))), *ticks(desk)]
    assert drained[0] == ["quiesce A#1"]
    told = sorted(word for words in drained for word in words)
    assert told == sorted(word for name in names for word in (f"quiesce {name}#1", f"desire {name} 0"))


def test_a_machine_that_is_as_it_was_keeps_its_account() -> None:
    desk = Desk(model("A"))
    desk.warm("A", "A#1")
    assert desk.tell(NodesChanged(desk.spec.nodes)) == []


def test_a_model_without_devices_fits_beside_devices_that_are_over_their_budget() -> None:
    desk = Desk(model("A"), model("B"), model("C", num_gpus=0.0, num_cpus=1.0), recovering_until=1.0)
    for name in "AB":
        desk.tell(ReplicaStarted(name, f"{name}#1", "n", loading=True), ReplicaReady(f"{name}#1"))
    desk.at(1.0)
    assert "desire C 1" in desk.arrive("c", "C")
