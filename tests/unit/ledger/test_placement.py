"""Who fits where: devices, fractions, CPUs, memory, capacity, groups, nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ledger.books.placement import Book
from cluster.ledger.books.shapes import shape_of
from cluster.ledger.events import ConfigChanged, NodesChanged, RequestCancelled
from cluster.ledger.specs import ModelSpec, NodeSpec
from tests.unit.ledger.desk import Desk, model

BOUND = (5.0, 8.0, 12.0)


def test_larger_than_the_whole_budget_is_refused_at_once_and_evicts_nothing() -> None:
    nodes = {"n": NodeSpec("n", gpus=1, memory_mib=1000)}
    desk = Desk(model("A", memory_mib=1001), model("B", memory_mib=900), model("C", num_gpus=2.0), nodes=nodes)
    desk.warm("B", "B#1")
    assert desk.arrive("a1", "A", priority=1) == ["reject a1 MemoryBudgetExceeded"]
    assert desk.arrive("c1", "C", priority=1) == ["reject c1 MemoryBudgetExceeded"]
    assert desk.state("B#1") == "READY"


def test_device_memory() -> None:
    nodes = {"n": NodeSpec("n", gpus=2, device_memory_mib=1000)}
    half = {"num_gpus": 0.5}
    desk = Desk(
        model("A", memory_mib=700, **half),
        model("B", memory_mib=700, **half),
        model("C", memory_mib=300, **half),
        model("D", memory_mib=1500, **half),
        model("E", memory_mib=400, **half),
        nodes=nodes,
    )
    for name in "ABC":
        desk.warm(name, f"{name}#1")
    devices = {replica.model.name: replica.place.devices for replica in desk.ledger._pool.book.nodes["n"].replicas}
    assert devices["A"] != devices["B"]
    assert devices["C"] == devices["B"], "where Ray books it, for there is room"
    assert desk.arrive("d1", "D") == ["reject d1 MemoryBudgetExceeded"]
    assert desk.arrive("e1", "E")[0].startswith("quiesce"), "half a device is free, its memory is not"


def test_several_whole_devices() -> None:
    desk = Desk(model("A", num_gpus=2.0), model("B"), gpus=3)
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    assert desk.gone("A#1", "B#1") == ["desire A 0", "desire B 0"]


def test_cpus_are_counted() -> None:
    nodes = {"n": NodeSpec("n", cpus=4.0, memory_mib=1000)}
    desk = Desk(
        ModelSpec("A", num_cpus=3.0, memory_mib=100),
        ModelSpec("B", num_cpus=2.0, memory_mib=100),
        ModelSpec("C", num_cpus=5.0),
        ModelSpec("D", num_cpus=1.0, memory_mib=950),
        nodes=nodes,
    )
    desk.warm("A", "A#1")
    assert desk.arrive("c1", "C") == ["reject c1 MemoryBudgetExceeded"]
    assert desk.arrive("b1", "B") == ["quiesce A#1", "desire A 0"]
    desk.gone("A#1")
    desk.boot("B", "B#1")
    desk.release("b1")
    assert desk.arrive("d1", "D") == ["quiesce B#1", "desire B 0"]


def test_capacity() -> None:
    desk = Desk(model("A"), model("B"), model("C"), model("P", pinned=True), gpus=8, capacity=2)
    desk.warm("P", "P#1")
    desk.warm("A", "A#1")
    desk.now = 1.0
    assert desk.arrive("b1", "B") == ["quiesce A#1", "desire A 0"]
    assert desk.arrive("c1", "C") == [], "the place that A leaves is promised"
    assert desk.gone("A#1") == ["desire B 1"]
    desk.boot("B", "B#1")
    assert desk.release("b1")[0] == "quiesce B#1"
    assert desk.gone("B#1") == ["desire C 1"]


def test_capacity_takes_the_least_recently_used() -> None:
    desk = Desk(model("A"), model("B"), model("C"), gpus=8, capacity=2)
    desk.warm("A", "A#1")
    desk.now = 1.0
    desk.warm("B", "B#1")
    desk.now = 2.0
    desk.arrive("a2", "A")
    desk.release("a2")
    desk.now = 3.0
    assert desk.arrive("c1", "C") == ["quiesce B#1", "desire B 0"]


def test_capacity_of_one_evicts_all_replicas_of_the_victim() -> None:
    desk = Desk(model("A", max_replicas=2), model("B"), gpus=8, capacity=1, bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    desk.arrive("a2", "A")
    desk.boot("A", "A#2")
    desk.arrive("b1", "B", priority=1)
    assert sorted(desk.at(5.0)) == ["quiesce A#1", "quiesce A#2"]
    desk.release("a1", "a2")
    assert desk.gone("A#2", "A#1") == ["desire B 1"]


def test_capacity_protects_what_has_a_floor_until_the_bound() -> None:
    desk = Desk(model("A", min_replicas=1), model("B"), gpus=8, capacity=1, bound_s=BOUND, load_prior_s=0.0)
    desk.at(0.0)
    desk.boot("A", "A#1")
    assert desk.arrive("b1", "B", priority=1) == []
    assert desk.at(4.9) == []
    assert desk.at(5.0) == ["quiesce A#1", "desire A 0"]


def test_capacity_that_was_lowered_is_reached_by_draining() -> None:
    desk = Desk(model("A"), model("B"), model("C"), gpus=8)
    for name in "ABC":
        desk.warm(name, f"{name}#1")
    assert desk.tell(ConfigChanged(replace(desk.spec, capacity=1))) == []
    assert desk.gone("A#1") == ["desire A 0"]
    assert desk.arrive("a1", "A") == ["quiesce B#1", "quiesce C#1", "desire B 0", "desire C 0"]
    assert desk.gone("B#1") == []
    assert desk.gone("C#1") == ["desire A 1"]


def test_groups_that_must_not_share() -> None:
    half = {"num_gpus": 0.5, "group": "g"}
    desk = Desk(model("A", **half), model("B", **half), model("C", num_gpus=0.5), gpus=1)
    desk.warm("A", "A#1")
    assert desk.arrive("c1", "C") == ["desire C 1"]
    desk.tell(RequestCancelled("c1"))
    assert desk.arrive("b1", "B") == ["quiesce A#1", "desire A 0"]


def test_groups_that_share_meet_on_one_device() -> None:
    half = {"num_gpus": 0.5, "group": "g", "group_share": True}
    desk = Desk(model("A", **half), model("X"), model("B", **half), gpus=2)
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    devices = {each.model.name: each.place.devices for each in desk.ledger._pool.book.nodes["n"].replicas}
    assert devices["A"] == devices["B"]
    desk.warm("X", "X#1")


def test_group_that_shares_waits_for_its_device() -> None:
    share = {"group": "g", "group_share": True}
    desk = Desk(model("A", num_gpus=0.5, **share), model("X", num_gpus=0.5), model("B", num_gpus=0.5, **share), gpus=2)
    desk.warm("A", "A#1")
    desk.warm("X", "X#1")
    # X stands on A's device; only there B may go, though another device is empty.
    assert desk.arrive("b1", "B") == ["quiesce X#1", "desire X 0"]
    assert desk.gone("X#1") == ["desire B 1"]


@pytest.mark.parametrize("floor", [0, 1])
@pytest.mark.parametrize("max_asleep", [0, None])
def test_group_that_shares_meets_where_the_one_that_is_bound_may_go(floor: int, max_asleep: int | None) -> None:
    half = {"num_gpus": 0.5, "group": "g", "group_share": True}
    main, draft = model("M", min_replicas=floor, **half), model("D", devices=("1",), min_replicas=floor, **half)
    desk = Desk(main, draft, gpus=2, max_asleep=max_asleep)
    desk.arrive("m1", "M")
    desk.arrive("d1", "D")
    said = desk.boot("M", "M#1") + desk.boot("D", "D#1")
    assert [each for each in said if each.startswith("grant")] == ["grant m1 M#1", "grant d1 D#1"]
    assert desk.devices("M#1") == desk.devices("D#1") == (1,)
    assert desk.at(100.0) == [], "nobody is loaded again"


def test_group_that_cannot_meet_is_placed_all_the_same() -> None:
    share = {"group": "g", "group_share": True}
    apart = model("A", devices=("0",), **share), model("B", devices=("1",), **share)
    desk = Desk(*apart, model("C", num_gpus=2.0, **share), gpus=2)
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    assert (desk.devices("A#1"), desk.devices("B#1")) == ((0,), (1,))
    assert desk.arrive("c1", "C") == ["quiesce B#1", "quiesce A#1", "desire B 0", "desire A 0"]


def test_node_that_shrinks_is_excused() -> None:
    desk = Desk(model("A"), model("B"), gpus=2)
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=1)})) == []
    assert desk.arrive("a1", "A") == ["grant a1 A#1"]


def test_budget_that_shrinks_refuses_those_who_wait() -> None:
    desk = Desk(model("A", memory_mib=500), nodes={"n": NodeSpec("n", gpus=0, memory_mib=100)})
    assert desk.arrive("r1", "A") == ["reject r1 MemoryBudgetExceeded"]
    desk = Desk(model("A", memory_mib=500), model("B"), nodes={"n": NodeSpec("n", gpus=1, memory_mib=600)})
    desk.warm("B", "B#1")
    desk.arrive("b1", "B")
    desk.arrive("a1", "A")
    # A machine that only left may come back; one that came back smaller will not hold it.
    assert desk.tell(NodesChanged({})) == ["quiesce B#1"]
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=1, memory_mib=400)})) == ["reject a1 MemoryBudgetExceeded"]


def test_before_any_node_is_known_all_wait() -> None:
    desk = Desk(model("A"), nodes={})
    assert desk.arrive("r1", "A") == []
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=1)})) == ["desire A 1"]


def test_what_several_nodes_hold_together() -> None:
    book = Book()
    book.set_nodes({name: NodeSpec(name, gpus=2, cpus=4.0, memory_mib=1000, device_memory_mib=600) for name in "ab"})
    assert book.could_ever_fit(shape_of(ModelSpec("A", num_gpus=0.5, memory_mib=300), None), 6)
    assert not book.could_ever_fit(shape_of(ModelSpec("A", num_gpus=0.5, memory_mib=300), None), 7)
    assert not book.could_ever_fit(shape_of(ModelSpec("A", num_gpus=0.5, memory_mib=700), None), 1)
    assert not book.could_ever_fit(shape_of(ModelSpec("A", num_cpus=3.0), None), 3)
    assert book.could_ever_fit(shape_of(ModelSpec("A", num_gpus=1.0), None), 4)


def test_big_model_is_not_overtaken_by_small_ones() -> None:
    """While its victims drain, the room that is free already is earmarked."""
    desk = Desk(
        model("big", num_gpus=2.0), model("A", slots=2), model("B", slots=2), gpus=2, bound_s=BOUND, load_prior_s=0.0
    )
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    desk.arrive("big1", "big", priority=1)
    assert desk.at(5.0) == ["quiesce A#1"]
    assert desk.arrive("b1", "B", priority=1) == []
    desk.release("a1")
    assert desk.gone("A#1") == ["desire big 1"]


def test_promise_is_kept_where_room_turns_up_first() -> None:
    desk = Desk(model("A", slots=2), model("B"), model("C"), gpus=2, bound_s=BOUND, load_prior_s=0.0)
    desk.arrive("a1", "A", priority=1)
    desk.boot("A", "A#1")
    desk.arrive("c1", "C", priority=1)
    desk.boot("C", "C#1")
    desk.arrive("b1", "B", priority=1)
    victim = desk.at(5.0)[0].removeprefix("quiesce ")
    other = "C#1" if victim == "A#1" else "A#1"
    assert desk.gone(other) == [f"reopen {victim}", f"desire {other[0]} 0", "desire B 1"]


def test_many_nodes_are_searched_in_turns() -> None:
    nodes = {f"n{index}": NodeSpec(f"n{index}", gpus=1) for index in range(40)}
    models = [model(f"m{index}", pinned=index != 39) for index in range(40)]
    desk = Desk(*models, model("X"), nodes=nodes, load_prior_s=0.0)
    for index in range(40):
        desk.warm(f"m{index}", f"m{index}#1", f"n{index}")
    said = desk.arrive("x1", "X")
    for _ in range(4):
        said += desk.at(desk.now + 0.3)
    assert said[0] == "quiesce m39#1"


def test_what_is_kept_without_demand_starts_when_a_machine_comes_whatever_was_heard_before() -> None:
    desk = Desk(model("kept", min_replicas=1), model("first", preload=True), nodes={})
    assert desk.at(1.0) == []
    assert desk.tell(NodesChanged({"n": NodeSpec("n", gpus=2)})) == ["desire kept 1", "desire first 1"]


def test_a_device_over_its_budget_blocks_no_other_device() -> None:
    nodes = {"n": NodeSpec("n", gpus=8, device_memory_mib=24_000)}
    half = [model(name, num_gpus=0.5, memory_mib=12_000) for name in "AB"]
    desk = Desk(*half, model("C", memory_mib=20_000), nodes=nodes)
    for name, measured in (("A", 12_000), ("B", 12_001)):
        desk.arrive(f"r{name}", name)
        desk.boot(name, f"{name}#1", memory=measured)
        desk.release(f"r{name}")
    assert desk.devices("A#1") == desk.devices("B#1") == (0,)
    assert desk.arrive("c", "C") == ["desire C 1"]
