"""What Ray has booked of the devices, by its own rules: what its books cannot fit is not planned, nor promised away.

Only where a replica ends with its engine: there each process takes its share of Ray's books.
"""

from __future__ import annotations

import pytest

from cluster.ledger.books.packing import pack
from cluster.ledger.books.shapes import UNIT, shape_of
from cluster.ledger.events import ConfigChanged, LoadRequested, ReplicaReady, ReplicaStarted
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.unit.ledger.desk import Desk, model

NODES = {name: NodeSpec(name, gpus=1, cpus=4.0) for name in ("n1", "n2")}


@pytest.mark.parametrize(
    ("free", "gpus", "devices"),
    [
        ([1.0, 1.0], 0.4, (0,)),
        ([1.0, 0.5], 0.4, (1,)),
        ([0.5, 0.5], 0.4, (0,)),
        ([0.3, 0.5], 0.4, (1,)),
        ([0.3, 0.3], 0.4, None),
        ([0.9, 1.0, 1.0], 1.0, (1,)),
        ([1.0, 0.9, 1.0], 2.0, (0, 2)),
        ([1.0, 0.9], 2.0, None),
    ],
)
def test_ray_takes_the_tightest_device_for_a_fraction_and_whole_ones_in_order(
    free: list[float], gpus: float, devices: tuple[int, ...] | None
) -> None:
    assert pack([round(each * UNIT) for each in free], shape_of(ModelSpec("m", num_gpus=gpus), None)) == devices


def promised() -> Desk:
    """Half of each device is free. X streams on the first, all of which is promised to F once X has left."""
    half = {"num_gpus": 0.5}
    desk = Desk(
        model("w", **half),
        model("x", **half),
        model("y", pinned=True, **half),
        model("F"),
        model("d", num_gpus=0.4),
        gpus=2,
        bound_s=(5.0, 8.0, 12.0),
        load_prior_s=0.0,
    )
    for name in "xwy":
        desk.arrive(f"{name}1", name, priority=1)
        desk.tell(ReplicaStarted(name, name.upper(), "n", booked=(int(name == "y"),)), ReplicaReady(name.upper()))
    desk.release("w1")
    desk.arrive("F1", "F", priority=1)
    assert desk.at(5.0) == ["quiesce W", "quiesce X", "desire w 0"]
    desk.gone("W")
    return desk


def test_nothing_starts_that_ray_would_pack_into_promised_room() -> None:
    desk = promised()
    assert desk.arrive("d1", "d") == [], "half of the other device is free, and Ray would take the first"
    assert desk.release("x1") == ["desire x 0"]
    assert desk.gone("X") == ["desire F 1", "desire d 1"], "with F on the first, Ray takes the other"
    desk.tell(ReplicaStarted("F", "F", "n", booked=(0,)), ReplicaStarted("d", "D", "n", booked=(1,)))
    assert [(each.replica, each.devices) for each in desk.loads[-2:]] == [("F", (0,)), ("D", (1,))]


def test_what_ray_cannot_start_is_planned_anew_and_not_waited_for() -> None:
    """Ray has started d before F, on the device that F was to have; F's process could never start."""
    desk = promised()
    desk.arrive("d1", "d")
    desk.release("x1")
    desk.gone("X")
    assert desk.tell(ReplicaStarted("d", "D", "n", booked=(0,))) == ["desire F 0"]
    desk.tell(ReplicaReady("D"))
    assert desk.release("d1") == ["quiesce D", "desire d 0"]
    assert desk.gone("D") == ["desire F 1"]
    assert desk.boot("F", "F") == ["grant F1 F"]


def test_room_is_made_in_rays_books_as_well() -> None:
    """a and b must not meet, so b's engine stands beside the device on which Ray has packed both of them."""
    apart = {"num_gpus": 0.5, "group": "g"}
    desk = Desk(model("a", **apart), model("b", **apart), model("c", num_gpus=0.6, devices=("0",)), gpus=2)
    for name in "ab":
        desk.arrive(f"{name}1", name)
        desk.tell(ReplicaStarted(name, name.upper(), "n", booked=(0,)), ReplicaReady(name.upper()))
        desk.release(f"{name}1")
    assert (desk.devices("A"), desk.devices("B")) == ((0,), (1,))
    assert desk.arrive("c1", "c") == ["quiesce A", "desire a 0"]
    desk.gone("A")
    assert desk.tell(ReplicaStarted("c", "C", "n", booked=(1,))) == []
    assert desk.loads[-1].devices == (0,)


def test_an_engine_stands_where_ray_has_booked_it() -> None:
    desk = Desk(model("a", num_gpus=0.5), gpus=2)
    desk.arrive("a1", "a")
    desk.tell(ReplicaStarted("a", "A", "n", booked=(1,)))
    assert desk.loads[-1].devices == (1,)


def test_an_engine_that_may_not_stand_where_ray_has_booked_it_stays_where_it_was_planned() -> None:
    desk = Desk(model("a", num_gpus=0.5, devices=("0",)), gpus=2)
    desk.arrive("a1", "a")
    desk.tell(ReplicaStarted("a", "A", "n", booked=(1,)))
    assert desk.loads[-1].devices == (0,)


# --- several nodes ----------------------------------------------------------------------------------------------------


def test_a_start_gives_way_to_another_that_ray_put_in_its_place() -> None:
    """a was planned beside x and Ray starts it on the empty node, where b was to go: no device is sold twice."""
    desk = Desk(model("x", num_gpus=0.5), model("a", num_gpus=0.5), model("b"), nodes=NODES)
    desk.arrive("x1", "x")
    desk.tell(ReplicaStarted("x", "X", "n1", booked=(0,)), ReplicaReady("X"))
    assert desk.arrive("a1", "a") == ["desire a 1"]
    assert desk.arrive("b1", "b") == ["desire b 1"]
    assert desk.tell(ReplicaStarted("a", "A", "n2", booked=(0,))) == ["desire b 0"], "there is no room for b now"
    desk.tell(ReplicaReady("A"))
    assert desk.release("a1") == ["quiesce A", "desire a 0"]
    assert desk.gone("A") == ["desire b 1"]


def test_a_start_that_lost_its_place_goes_where_there_is_room_and_serve_hears_nothing() -> None:
    desk = Desk(model("a"), model("b"), nodes=NODES | {"n3": NodeSpec("n3", gpus=1, cpus=4.0)})
    desk.arrive("a1", "a")
    desk.arrive("b1", "b")
    planned = {each.model.name: node.name for node in desk.ledger._pool.book.nodes.values() for each in node.replicas}
    assert desk.tell(ReplicaStarted("a", "A", planned["b"], booked=(0,))) == []
    assert desk.boot("b", "B", planned["a"]) == ["grant b1 B"]


def test_a_start_that_lost_its_device_gets_another_of_its_node() -> None:
    nodes = NODES | {"n2": NodeSpec("n2", gpus=2, cpus=4.0)}
    desk = Desk(model("a"), model("b", num_cpus=2.0, devices=("n2/0", "n2/1")), nodes=nodes)
    desk.arrive("a1", "a")
    desk.arrive("b1", "b")
    assert desk.tell(ReplicaStarted("a", "A", "n2", booked=(0,))) == []
    desk.boot("b", "B", "n2")
    assert [(each.replica, each.devices) for each in desk.loads] == [("A", (0,)), ("B", (1,))]


def test_a_model_that_ray_starts_where_it_cannot_load_is_not_refused_for_that() -> None:
    """c may stand on n2 only; Ray has room on both nodes, and chooses the wrong one more often than engines may die."""
    desk = Desk(model("c", devices=("n2/0",)), nodes=NODES)
    assert desk.arrive("c1", "c") == ["desire c 1"]
    for turn in range(5):
        assert desk.tell(ReplicaStarted("c", f"c{turn}", "n1", booked=(0,))) == ["desire c 0"]
        assert desk.gone(f"c{turn}") == []
        assert desk.at(desk.now + 1.0) == ["desire c 1"]
    assert desk.boot("c", "C", "n2") == ["grant c1 C"]


def test_cpus_that_another_start_took() -> None:
    nodes = {"n1": NodeSpec("n1", cpus=4.0), "n2": NodeSpec("n2", cpus=2.0)}
    desk = Desk(ModelSpec("a", num_cpus=2.0), ModelSpec("b", num_cpus=4.0), nodes=nodes)
    desk.arrive("a1", "a")
    desk.arrive("b1", "b")
    assert desk.tell(ReplicaStarted("a", "A", "n1")) == ["desire b 0"]


def test_an_order_whose_starts_are_planned_anew_stays_one_order() -> None:
    desk = Desk(model("a", max_replicas=2, num_gpus=0.6), model("b", num_gpus=0.5), nodes=NODES)
    desk.arrive("b1", "b")
    assert desk.tell(LoadRequested("a", 1)) == ["desire a 1"]
    booked = {each.model.name: node.name for node in desk.ledger._pool.book.nodes.values() for each in node.replicas}
    assert booked["a"] != booked["b"]
    assert desk.tell(ReplicaStarted("b", "B", booked["a"], booked=(0,))) == []
    assert desk.boot("a", "A", booked["b"]) == []
    assert desk.state("A") == "READY"


# --- what is heard ----------------------------------------------------------------------------------------------------


def test_after_a_restart_rays_books_are_as_they_were_announced() -> None:
    desk = Desk(model("a", num_gpus=0.5), model("b"), gpus=2, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "A", "n", 1.0, True, (1,), booked=(0,)))
    desk.at(2.0)
    node = desk.ledger._pool.book.nodes["n"]
    assert (node.gpu, node.ray.free) == ([UNIT, UNIT // 2], [UNIT // 2, UNIT])


@pytest.mark.parametrize("booked", [(), (0, 1), (1023,)])
def test_a_booking_that_is_unknown_or_of_no_sense_changes_little(booked: tuple[int, ...]) -> None:
    desk = Desk(model("a"), gpus=2)
    desk.arrive("a1", "a")
    desk.tell(ReplicaStarted("a", "A", "n", booked=booked), ReplicaReady("A"))
    assert (desk.state("A"), desk.devices("A")) == ("READY", (0,))


@pytest.mark.parametrize("booked", [(-1,), ("0",), (5000,)])
def test_a_malformed_booking_is_ignored(booked: tuple[object, ...]) -> None:
    desk = Desk(model("a"))
    desk.arrive("a1", "a")
    desk.tell(ReplicaStarted("a", "A", "n", booked=booked))  # type: ignore[arg-type]
    assert desk.state("A") is None


def test_where_replicas_stay_rays_books_are_no_matter() -> None:
    desk = Desk(model("a", num_gpus=0.5), model("b"), max_asleep=None)
    desk.arrive("a1", "a")
    desk.tell(ReplicaStarted("a", "A", "n", booked=(0,)), ReplicaReady("A"))
    node = desk.ledger._pool.book.nodes["n"]
    assert node.ray.free == [UNIT]
    ends = PoolSpec(models=desk.spec.models, nodes=desk.spec.nodes)
    desk.tell(ConfigChanged(ends))
    assert node.ray.are_asked


def test_what_ray_puts_elsewhere_stays_as_planned_where_a_start_has_no_other_device() -> None:
    """The two came and went for ever: the one was started anew as soon as the other had made it leave."""
    desk = Desk(model("bound", devices=("0",)), model("small", num_gpus=0.5), gpus=2)
    desk.arrive("r1", "bound")
    desk.arrive("r2", "small")
    assert desk.tell(ReplicaStarted("small", "s", "n", booked=(0,))) == []
    assert desk.devices("s") == (1,)
    assert desk.tell(ReplicaStarted("bound", "b", "n", booked=(1,))) == []
    assert desk.devices("b") == (0,)
    assert desk.tell(ReplicaReady("s"), ReplicaReady("b")) == ["grant r2 s", "grant r1 b"]
    assert {each.replica: each.devices for each in desk.loads} == {"s": (1,), "b": (0,)}
