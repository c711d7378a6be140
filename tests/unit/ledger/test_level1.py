"""Engines that sleep (level 1): a swap gives back the devices and keeps the weights in the host's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.ledger.events import (
    ConfigChanged,
    EngineAsleep,
    EngineDied,
    EngineUnloaded,
    LoadRequested,
    NodesChanged,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStarted,
    ReplicaStopping,
    ReplicaSuspected,
    UnloadRequested,
)
from cluster.ledger.specs import ModelSpec, NodeSpec
from tests.unit.ledger.desk import Desk, model


def sleeper(name: str, **more: Any) -> ModelSpec:
    return model(name, **{"sleep_level": 1, "memory_mib": 1000, **more})


def node(**more: Any) -> dict[str, NodeSpec]:
    return {"n": NodeSpec("n", **{"gpus": 1, "cpus": 8.0, "device_memory_mib": 2000, **more})}


def two(b: ModelSpec | None = None, held: int = 100, **more: Any) -> Desk:
    """Model a is loaded in u and idle, b sleeps in v with its engine, and there is one device for both."""
    desk = Desk(sleeper("a"), b or sleeper("b"), **{"max_asleep": None, "nodes": node(), **more})
    desk.warm("b", "v")
    desk.now = 5.0
    assert desk.arrive("first", "a") == ["quiesce v", "sleep v", "desire a 1"]
    desk.now = 6.0
    desk.tell(EngineAsleep("v", 1000, held), ReplicaStarted("a", "u", "n"))
    desk.now = 8.0
    assert desk.tell(ReplicaReady("u")) == ["grant first u"]
    desk.release("first")
    desk.loads.clear()
    return desk


def learned(desk: Desk, name: str) -> tuple[float | None, float | None, float | None]:
    known = desk.ledger._pool.models[name]
    return known.load_s, known.sleep_s, known.wake_s


def host_mib(desk: Desk) -> int:
    return desk.ledger._pool.book.node("n").host


def test_a_swap_puts_one_engine_to_sleep_and_wakes_the_other() -> None:
    desk = two()
    assert (desk.state("v"), desk.devices("v")) == ("ASLEEP", (0,))
    assert desk.ledger.snapshot().models["b"].status == "sleeping"
    assert desk.arrive("b1", "b") == ["quiesce u", "sleep u"]
    assert desk.state("u") == "UNLOADING"
    desk.now = 9.0
    assert desk.tell(EngineAsleep("u", 900, 50)) == ["wake v 0"]
    assert (desk.state("u"), desk.state("v"), desk.devices("u")) == ("ASLEEP", "LOADING", (0,))
    desk.now = 9.5
    assert desk.tell(ReplicaReady("v")) == ["grant b1 v"]
    assert learned(desk, "b") == (0.0, 1.0, 0.5)
    assert desk.loads == []
    assert desk.ledger.desired == {"a": 1, "b": 1}


def test_what_it_holds_is_booked_on_the_host_and_the_device() -> None:
    desk = two()
    account = desk.ledger._pool.book.node("n")
    assert account.host == 200 + 1000
    assert (account.gpu, account.device_memory) == ([0], [2000 - 1000 - 100])
    desk.arrive("b1", "b")
    assert account.host == 2 * (200 + 1000), "of a: as much as it takes loaded, until it has told"
    desk.tell(EngineAsleep("u", 900, 50))
    assert account.host == 200 + 900, "b is woken"
    assert account.device_memory == [2000 - 1000 - 50]


def test_it_wakes_on_its_own_devices_only() -> None:
    desk = Desk(sleeper("a"), sleeper("b"), sleeper("c"), gpus=2, max_asleep=None)
    desk.warm("a", "u")
    desk.warm("b", "v")
    first = desk.devices("u")
    assert desk.arrive("c1", "c") == ["quiesce u", "sleep u", "desire c 1"]
    desk.tell(EngineAsleep("u", 500, 10), ReplicaStarted("c", "w", "n"), ReplicaReady("w"))
    assert desk.devices("w") == first
    # The device of b has room, as b is idle; the one that a slept on has not.
    assert desk.arrive("a1", "a") == ["quiesce v", "sleep v", "unload u"]
    assert desk.devices("u") == first
    desk.tell(EngineUnloaded("u"))
    assert desk.loads[-1].replica != "u", "v is not gone yet"
    desk.tell(EngineAsleep("v", 500, 10))
    assert (desk.loads[-1].replica, desk.loads[-1].devices) == ("u", tuple({0, 1} - set(first)))


def test_a_free_device_elsewhere_is_better_than_a_victim() -> None:
    desk = Desk(sleeper("a"), sleeper("b"), gpus=2, max_asleep=None)
    desk.warm("a", "u")
    desk.warm("b", "v")
    own, other = desk.devices("u"), desk.devices("v")
    pool = desk.ledger._pool
    desk.tell(UnloadRequested("b"))
    desk.tell(EngineUnloaded("v"))
    pool.quiesce(pool.replicas["u"], desk.now)
    assert "sleep u" in desk.at(desk.now)
    desk.tell(EngineAsleep("u", 500, 10))
    pinned = replace(desk.spec, models={**desk.spec.models, "c": model("c", devices=(f"n/{own[0]}",), pinned=True)})
    desk.tell(ConfigChanged(pinned))
    desk.arrive("c1", "c")
    desk.boot("c", "w")
    assert desk.devices("w") == own
    desk.loads.clear()
    assert desk.arrive("a1", "a") == ["unload u"]
    desk.tell(EngineUnloaded("u"))
    assert [(each.replica, each.devices) for each in desk.loads] == [("u", other)]


def test_where_a_process_may_start_its_sleeper_stays() -> None:
    nodes = {name: NodeSpec(name, gpus=1, cpus=8.0) for name in ("n", "m")}
    desk = Desk(sleeper("a"), sleeper("b"), sleeper("c"), nodes=nodes, max_asleep=None)
    desk.warm("a", "u", "n")
    desk.warm("b", "v", "m")
    assert "sleep u" in desk.arrive("c1", "c")
    desk.tell(EngineAsleep("u", 500, 10))
    desk.boot("c", "w", "n")
    assert desk.arrive("a1", "a") == ["quiesce v", "sleep v", "desire a 2"]
    assert desk.state("u") == "ASLEEP"


def test_it_wakes_at_once_where_its_devices_are_free() -> None:
    desk = Desk(sleeper("a", idle_timeout_s=10.0), max_asleep=None)
    desk.warm("a", "u")
    assert desk.at(10.0) == ["quiesce u", "sleep u"]
    desk.tell(EngineAsleep("u", 500, 10))
    assert desk.arrive("a1", "a") == ["wake u 0"]


# --- which level ----------------------------------------------------------------------------------------------------


def test_by_choice_an_engine_sleeps_if_it_comes_back_sooner() -> None:
    desk = two(b=sleeper("b", sleep_level=0))
    desk.ledger._pool.models["b"].load_s = 3.0
    desk.arrive("b1", "b")
    desk.tell(EngineAsleep("u", 900, 50))
    desk.now += 1.0
    desk.tell(ReplicaReady("v"))
    desk.release("b1")
    assert learned(desk, "b") == (3.0, 1.0, 1.0)
    assert desk.arrive("a1", "a")[:2] == ["quiesce v", "sleep v"]
    desk.tell(EngineAsleep("v", 1000, 100), ReplicaReady("u"))
    desk.ledger._pool.models["b"].load_s = 1.6
    assert desk.release("a1") == []
    assert desk.tell(ConfigChanged(desk.spec)) == ["unload v"], "to load it takes less"
    desk.tell(EngineUnloaded("v"))
    desk.arrive("b2", "b")
    desk.tell(EngineAsleep("u", 900, 50))
    assert desk.loads[-1].replica == "v"
    desk.tell(ReplicaReady("v"))
    desk.release("b2")
    assert desk.arrive("a2", "a")[:2] == ["quiesce v", "unload v"]


def test_what_holds_too_much_of_its_device_ends() -> None:
    desk = two()
    desk.arrive("b1", "b")
    assert desk.tell(EngineAsleep("u", 900, 601)) == ["unload u", "wake v 0"], "there is room beside it"
    assert desk.devices("u") == (0,)
    desk.tell(EngineUnloaded("u"))
    desk.tell(ReplicaReady("v"))
    desk.release("b1")
    desk.arrive("a1", "a")
    desk.tell(EngineAsleep("v", 900, 100))
    desk.tell(ReplicaReady("u"))
    desk.release("a1")
    assert desk.arrive("b2", "b") == ["quiesce u", "unload u"], "it is known what it would hold"


def test_what_is_in_the_way_of_a_big_model_ends() -> None:
    desk = two()
    desk.tell(ConfigChanged(replace(desk.spec, models={**desk.spec.models, "c": model("c", memory_mib=1950)})))
    assert desk.arrive("c1", "c") == ["quiesce u", "unload v", "unload u", "desire c 1"]
    desk.tell(ReplicaStarted("c", "w", "n"), EngineUnloaded("u"))
    assert desk.loads == [], "v holds some of it"
    desk.tell(EngineUnloaded("v"))
    assert desk.loads[-1].replica == "w"


def test_what_was_thought_to_leave_room_and_does_not_ends_then() -> None:
    desk = two(held=0)
    spec = replace(desk.spec, asleep_device_mib=200, models={**desk.spec.models, "c": model("c", memory_mib=1800)})
    desk.tell(ConfigChanged(spec))
    assert desk.arrive("c1", "c") == ["quiesce u", "sleep u", "desire c 1"]
    desk.tell(ReplicaStarted("c", "w", "n"))
    assert desk.tell(EngineAsleep("u", 900, 201)) == ["unload u"]
    desk.tell(EngineUnloaded("u"))
    assert desk.loads[-1].replica == "w"


def test_the_budget_of_a_node_counts_what_sleeps() -> None:
    desk = two(nodes=node(device_memory_mib=0, memory_mib=2000))
    more = replace(desk.spec, models={**desk.spec.models, "c": model("c", memory_mib=1450)})
    desk.tell(ConfigChanged(more))
    assert desk.arrive("c1", "c")[:2] == ["quiesce u", "unload u"], "600 MiB are too much beside c"


def test_a_replica_on_another_node_is_no_matter() -> None:
    nodes = {name: NodeSpec(name, gpus=1, cpus=8.0, device_memory_mib=2000) for name in ("n", "m")}
    both = {"max_replicas": 2, "min_replicas": 0}
    desk = Desk(sleeper("a"), sleeper("b"), sleeper("c", **both), nodes=nodes, max_asleep=None)
    desk.warm("a", "u", "n")
    desk.warm("b", "v", "m")
    out = desk.tell(LoadRequested("c", 2))
    assert {"sleep u", "sleep v"} <= set(out)


@pytest.mark.parametrize("why", ["suspected", "config", "removed", "unloaded", "no level", "cannot"])
def test_an_engine_that_is_of_no_more_use_ends(why: str) -> None:
    desk = two(b=sleeper("b", sleep_level=2) if why == "cannot" else None) if why != "cannot" else None
    if desk is None:
        desk = Desk(sleeper("a", sleep_level=2), sleeper("b"), max_asleep=None)
        desk.warm("a", "u")
        assert desk.arrive("b1", "b")[:2] == ["quiesce u", "unload u"]
        return
    spec, out = desk.spec, None
    if why == "suspected":
        desk.tell(ReplicaSuspected("u"))
        out = desk.arrive("b1", "b")
        assert out == ["quiesce u", "unload u"]
        return
    if why == "config":
        out = desk.tell(ConfigChanged(replace(spec, models={**spec.models, "b": sleeper("b", revision="2")})))
    elif why == "removed":
        out = desk.tell(ConfigChanged(replace(spec, models={"a": spec.models["a"]})))
        assert (desk.state("v"), out) == ("STOPPING", ["desire b 0"])
        return
    elif why == "no level":
        out = desk.tell(ConfigChanged(replace(spec, models={**spec.models, "b": sleeper("b", sleep_level=2)})))
    elif why == "unloaded":
        assert desk.tell(UnloadRequested("a")) == ["quiesce u", "unload u"]
        return
    assert out == ["unload v"]
    assert (desk.state("v"), desk.devices("v")) == ("UNLOADING", (0,))
    assert desk.ledger.snapshot().models["b"].state == "unloaded"
    desk.tell(EngineUnloaded("v"))
    assert (desk.state("v"), desk.devices("v")) == ("ASLEEP", ())


def test_a_node_that_is_lost_keeps_no_sleeper() -> None:
    desk = two()
    assert "desire b 0" in desk.tell(NodesChanged({"m": NodeSpec("m", gpus=1, cpus=8.0)}))


# --- the host's memory ----------------------------------------------------------------------------------------------


def three(host: int, **more: Any) -> Desk:
    """a, b and c, of which c is loaded, after a and b in this order."""
    desk = Desk(
        *(sleeper(name) for name in "abc"),
        nodes=node(device_memory_mib=0, host_memory_mib=host),
        max_asleep=None,
        **more,
    )
    for name in "abc":
        desk.arrive(f"r-{name}", name)
        for word in desk.out_words():
            order, _, replica = word.partition(" ")
            if order in ("sleep", "unload"):
                desk.tell(EngineAsleep(replica, 800, 0) if order == "sleep" else EngineUnloaded(replica))
        desk.tell(ReplicaStarted(name, name, "n"), ReplicaReady(name))
        desk.release(f"r-{name}")
    return desk


def test_the_least_recently_used_engine_ends_when_the_host_is_full() -> None:
    desk = three(host=4 * 2000)
    assert [desk.state(name) for name in "abc"] == ["ASLEEP", "ASLEEP", "READY"]
    assert host_mib(desk) == 200 + 200 + 800
    assert desk.ledger.desired == {"a": 1, "b": 1, "c": 1}, "its process stays"
    assert (desk.devices("a"), desk.devices("b")) == ((), (0,))
    desk.arrive("b1", "b")
    desk.tell(EngineAsleep("c", 800, 0), ReplicaReady("b"))
    desk.release("b1")
    assert desk.state("a") == "ASLEEP"


def test_an_engine_that_the_host_could_never_hold_ends() -> None:
    desk = three(host=4 * 1100)
    assert host_mib(desk) == 400, "estimated, none was put to sleep"
    assert desk.ledger.snapshot().models["a"].asleep == 1


def test_replicas_go_when_the_host_has_no_room_for_them_either() -> None:
    desk = three(host=4 * 350)
    assert [desk.state(name) for name in "abc"] == ["STOPPING", "ASLEEP", "READY"]


def test_what_a_replica_takes_itself_is_measured() -> None:
    desk = Desk(sleeper("a"), sleeper("b"), max_asleep=None)
    desk.tell(ReplicaStarted("a", "u", "n", host_mib=70))
    assert host_mib(desk) == 70
    desk.arrive("b1", "b")
    desk.tell(ReplicaStarted("b", "v", "n", host_mib=80), ReplicaReady("v"))
    assert host_mib(desk) == 70, "what is loaded is not counted"
    desk.release("b1")
    desk.arrive("a1", "a")
    assert host_mib(desk) == 70 + 80 + 1000
    desk.tell(EngineAsleep("v", 300, 0))
    assert host_mib(desk) == 80 + 300


def test_the_number_of_sleepers_counts_both_levels() -> None:
    desk = two(max_asleep=1)
    assert desk.arrive("b1", "b") == ["quiesce u", "sleep u"]
    assert desk.tell(EngineAsleep("u", 900, 50)) == ["wake v 0"]
    desk.tell(ReplicaReady("v"))
    desk.tell(ConfigChanged(replace(desk.spec, models={**desk.spec.models, "c": sleeper("c")})))
    desk.release("b1")
    desk.arrive("c1", "c")
    assert desk.tell(EngineAsleep("v", 900, 50)) == ["desire a 0"]
    assert (desk.state("u"), desk.devices("u")) == ("STOPPING", (0,)), "it holds that until it is gone"
    desk.gone("u")
    assert desk.state("v") == "ASLEEP"


def test_it_ends_with_its_process_after_its_timeout() -> None:
    desk = two(b=sleeper("b", sleep_timeout_s=50.0))
    assert desk.at(55.9) == []
    assert desk.at(56.0) == ["desire b 0"]


def test_the_time_asleep_goes_on_when_its_engine_has_ended() -> None:
    desk = two(b=sleeper("b", sleep_timeout_s=50.0))
    desk.at(40.0)
    desk.tell(EngineUnloaded("v"))
    assert (desk.state("v"), desk.devices("v")) == ("ASLEEP", ())
    assert desk.at(56.0) == ["desire b 0"]


# --- what goes wrong ------------------------------------------------------------------------------------------------


def waking() -> Desk:
    desk = two()
    desk.arrive("b1", "b")
    assert desk.tell(EngineAsleep("u", 900, 50)) == ["wake v 0"]
    return desk


@pytest.mark.parametrize("event", [ReplicaFailed("v", "no"), EngineDied("v", "signal 9")])
def test_after_a_waking_that_fails_the_engine_is_loaded(event: Any) -> None:
    desk = waking()
    assert desk.tell(event) == ["unload v"], "its waiters stay"
    assert desk.tell(event) == [], "told twice"
    desk.tell(EngineUnloaded("v"))
    assert [(each.replica, each.devices) for each in desk.loads] == [("v", (0,))]
    assert desk.state("v") == "LOADING"
    desk.now += 2.0
    assert desk.tell(ReplicaReady("v")) == ["grant b1 v"]
    assert learned(desk, "b")[0] == 0.6
    assert desk.loads[1:] == []


def test_a_model_that_does_not_wake_is_not_put_to_sleep_again_by_choice() -> None:
    desk = two(b=sleeper("b", sleep_level=0))
    desk.arrive("b1", "b")
    desk.tell(EngineAsleep("u", 900, 50), ReplicaFailed("v", "no"), EngineUnloaded("v"), ReplicaReady("v"))
    desk.release("b1")
    assert desk.arrive("a1", "a")[:2] == ["quiesce v", "unload v"]


def test_a_waking_that_hangs_becomes_a_load_and_that_has_its_own_time() -> None:
    desk = waking()
    begun = desk.now
    assert desk.at(begun + 9.9) == []
    assert desk.loads == []
    assert desk.at(begun + 10.0) == ["unload v"]
    desk.tell(EngineUnloaded("v"))
    assert [each.replica for each in desk.loads] == ["v"]
    assert desk.at(begun + 129.9) == []
    assert desk.at(begun + 130.0)[0] == "reject b1 BackendTimeout"


def test_a_slow_loader_may_wake_slowly() -> None:
    desk = waking()
    desk.ledger._pool.models["b"].load_s = 30.0
    assert desk.at(desk.now + 59.9) == []
    assert desk.loads == []


def test_a_waking_that_is_taken_back_ends() -> None:
    desk = waking()
    assert desk.tell(UnloadRequested("b")) == ["reject b1 ModelUnavailable", "unload v"]
    desk.tell(ReplicaReady("v"), EngineUnloaded("v"))
    assert (desk.state("v"), desk.devices("v")) == ("ASLEEP", ())


def test_a_process_that_dies_while_it_wakes_costs_a_start() -> None:
    desk = waking()
    desk.gone("v")
    assert "desire b 1" in desk.at(desk.now + 1.0)


def test_an_engine_that_cannot_sleep_is_gone() -> None:
    desk = two()
    desk.arrive("b1", "b")
    assert desk.tell(EngineUnloaded("u")) == ["wake v 0"]
    assert (desk.state("u"), desk.devices("u")) == ("ASLEEP", ())


def test_an_engine_that_does_not_fall_asleep_is_ended_and_then_its_replica() -> None:
    desk = two()
    desk.arrive("b1", "b")
    begun = desk.now
    assert desk.at(begun + 29.9) == []
    assert desk.at(begun + 30.0) == ["unload u"]
    assert desk.tell(EngineAsleep("u", 900, 50)) == [], "too late: it is being ended"
    assert desk.at(begun + 60.0) == ["end u"]
    assert desk.gone("u") == ["wake v 0", "desire a 0"]


def test_an_engine_that_dies_asleep_is_loaded_when_it_is_wanted() -> None:
    desk = two()
    assert desk.tell(EngineUnloaded("v")) == []
    assert (desk.state("v"), desk.devices("v")) == ("ASLEEP", ())
    desk.arrive("b1", "b")
    desk.tell(EngineAsleep("u", 900, 50))
    assert desk.loads[-1].replica == "v"


def test_a_sleep_that_nobody_ordered_is_ended() -> None:
    desk = two()
    desk.tell(EngineUnloaded("v"))
    assert desk.tell(EngineAsleep("v", 1, 1)) == ["unload v"]
    assert desk.tell(EngineAsleep("u", 1, 1), EngineAsleep("nobody", 1, 1)) == []


def test_a_sleeper_that_says_it_serves_is_ended() -> None:
    desk = two()
    assert desk.tell(ReplicaReady("v")) == ["unload v"]
    assert desk.state("v") == "UNLOADING"


def test_a_sleeping_replica_that_dies_leaves_nothing() -> None:
    desk = two()
    assert desk.gone("v") == ["desire b 0"]
    assert desk.ledger._pool.book.node("n").device_memory == [1000]


# --- a new life of the ledger ---------------------------------------------------------------------------------------


def test_a_restarted_ledger_learns_of_engines_that_sleep() -> None:
    desk = Desk(sleeper("a"), sleeper("b"), gpus=2, max_asleep=None, recovering_until=2.0)
    desk.tell(ReplicaStarted("a", "u", "n", 1.0, devices=(1,), host_mib=90, asleep_mib=(400, 20)))
    desk.tell(ReplicaStarted("b", "v", "n", 1.0, host_mib=80))
    assert (desk.devices("u"), host_mib(desk)) == ((1,), 90 + 400 + 80)
    assert desk.at(2.0) == ["desire a 1", "desire b 1"]
    assert desk.arrive("a1", "a") == ["wake u 1"]


def test_a_sleeper_that_nobody_asked_for_ends_with_its_process() -> None:
    desk = Desk(sleeper("a"), max_asleep=None)
    desk.warm("a", "u")
    desk.tell(ReplicaStarted("a", "v", "n", 1.0, devices=(0,), host_mib=90, asleep_mib=(400, 20)))
    assert desk.state("v") == "STOPPING"


@pytest.mark.parametrize("wrong", [(-1, None), (1, (1,)), (1, (1, -1)), (1, (1, "x"))])
def test_nonsense_about_memory_is_ignored(wrong: tuple[Any, Any]) -> None:
    desk = Desk(sleeper("a"), max_asleep=None)
    assert desk.tell(ReplicaStarted("a", "u", "n", 1.0, False, (), False, False, (), *wrong)) == []
    assert desk.state("u") is None


@pytest.mark.parametrize("wakes", [True, False])
def test_a_sleeper_that_serve_stops_goes_with_its_engine(wakes: bool) -> None:
    desk = two()
    if wakes:
        desk.arrive("b1", "b")
        assert desk.tell(EngineAsleep("u", 900, 50)) == ["wake v 0"]
    assert desk.tell(ReplicaStopping("v")) == ["desire b 0"]
    assert desk.state("v") == "STOPPING"
    assert desk.gone("v") == (["desire b 1"] if wakes else [])


def test_who_will_not_wait_for_a_load_may_be_served_by_an_engine_that_wakes() -> None:
    """Two loads took 20 s each, and no waking was seen yet."""
    desk = Desk(sleeper("a"), sleeper("b"), max_asleep=None, nodes=node())
    for turn in range(2):
        desk.arrive(f"load{turn}", "b")
        if not turn:
            desk.tell(ReplicaStarted("b", "v", "n"))
        desk.now += 20.0
        desk.tell(ReplicaReady("v"))
        desk.release(f"load{turn}")
        if not turn:
            desk.tell(UnloadRequested("b"), EngineUnloaded("v"))
    assert desk.arrive("a1", "a") == ["quiesce v", "sleep v", "desire a 1"]
    desk.tell(EngineAsleep("v", 1000, 100), ReplicaStarted("a", "u", "n"), ReplicaReady("u"))
    desk.release("a1")
    assert desk.arrive("b1", "b", timeout=5.0) == ["quiesce u", "sleep u"]
    assert desk.tell(EngineAsleep("u", 1000, 100)) == ["wake v 0"]
    assert desk.arrive("b2", "b", timeout=5.0) == []
    assert desk.tell(ReplicaReady("v")) == ["grant b1 v"]
