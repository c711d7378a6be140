"""External servers in the pure ledger: manifests, turns, the just-in-time guard, bounds, restarts."""

from __future__ import annotations

import dataclasses
import logging
import random

import pytest

from cluster.ledger import server_turns, servers
from cluster.ledger.events import (
    ConfigChanged,
    Event,
    Grant,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    Reject,
    ReplicaReady,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    ServerManifest,
    ServerSuspected,
    SetDesired,
    Ticked,
)
from cluster.ledger.ledger import Ledger
from cluster.ledger.records import Model
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec, ServerSpec

ONE, TWO = "http://one", "http://two"


class Desk:
    """A ledger with external servers, driven by hand; every step is checked."""

    def __init__(self, *specs: ServerSpec, manifests: dict[str, str] | None = None, **pool: object) -> None:
        self.spec = PoolSpec(servers=specs, **pool)
        self.ledger = Ledger(self.spec, epoch="e1", now=0.0)
        self.now = 0.0
        self.held: dict[str, Grant] = {}
        for url, models in (manifests or {}).items():
            self.hear(url, models)

    def post(self, event: Event, after: float = 0.0) -> list[object]:
        self.now += after
        out = self.ledger.decide(event, self.now)
        self.ledger.check()
        for command in out:
            if isinstance(command, Grant):
                self.held[command.request] = command
        return out

    def hear(self, url: str, models: str | None, error: str | None = None) -> list[object]:
        return self.post(ServerManifest(url, None if models is None else tuple(models.split()), error))

    def ask(
        self, request: str, model: str, priority: int = 2, timeout: float = 1000.0, holder: str = "h"
    ) -> list[object]:
        return self.post(RequestArrived(request, holder, model, priority, self.now + timeout))

    def done(self, request: str, after: float = 1.0) -> list[object]:
        return self.post(LeaseReleased(request, self.held.pop(request).generation), after)

    def server(self, url: str = ONE) -> dict[str, object]:
        return next(row for row in self.ledger.snapshot()["servers"] if row["url"] == url)


def granted(out: list[object]) -> dict[str, str]:
    return {each.request: each.replica for each in out if isinstance(each, Grant)}


def refused(out: list[object]) -> dict[str, str]:
    return {each.request: each.error for each in out if isinstance(each, Reject)}


# --- manifests ------------------------------------------------------------------------------------------------------


def test_a_manifest_makes_models_known_and_its_slots_are_granted():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b a"})
    assert desk.server()["available_models"] == ["a", "b"]
    assert desk.server()["current_model"] is None
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert granted(desk.ask("r2", "a")) == {"r2": ONE}
    assert [desk.held[each].slot for each in ("r1", "r2")] == [0, 1]
    row = desk.server()
    assert (row["active_requests"], row["current_model"], row["is_busy"]) == (2, "a", True)
    assert desk.ask("r3", "a") == []
    assert granted(desk.done("r1")) == {"r3": ONE}
    assert desk.held["r3"].slot == 0
    assert desk.held["r3"].queue_wait_s == 1.0
    desk.done("r2")
    desk.done("r3")
    assert desk.server()["current_model"] is None
    snapshot = desk.ledger.snapshot()
    assert (snapshot["leases"], snapshot["queued"], snapshot["finished"]) == (0, 0, 3)
    assert {name: row["state"] for name, row in snapshot["models"].items()} == {"a": "loaded", "b": "unloaded"}
    assert snapshot["models"]["a"]["remote"] is True


def test_no_replica_is_ever_wanted_for_a_servers_model():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"}, nodes={"n": NodeSpec("n", gpus=1)})
    for request in ("r1", "r2", "r3"):
        assert not [each for each in desk.ask(request, "a") if isinstance(each, SetDesired)]
    assert desk.ledger.desired == {"a": 0}


def test_requests_before_the_first_manifest_wait_for_it():
    desk = Desk(ServerSpec(ONE), ServerSpec(TWO))
    assert desk.ask("r1", "a") == desk.ask("r2", "x") == []
    assert granted(desk.hear(ONE, "a")) == {"r1": ONE}
    assert desk.ask("r3", "x") == []
    out = desk.hear(TWO, None, "connection refused")
    assert refused(out) == {"r2": "ModelNotFound", "r3": "ModelNotFound"}
    assert out[0].extras["available_models"] == ["a"]
    assert refused(desk.ask("r4", "x")) == {"r4": "ModelNotFound"}
    assert set(desk.ledger.snapshot()["models"]) == {"a"}


def test_only_so_many_unheard_of_models_are_waited_for(monkeypatch):
    monkeypatch.setattr(server_turns, "MAX_EXPECTED", 1)
    desk = Desk(ServerSpec(ONE))
    assert desk.ask("r1", "a") == []
    assert refused(desk.ask("r2", "b")) == {"r2": "ModelNotFound"}


def test_a_server_that_cannot_be_read_serves_nothing_until_it_can():
    desk = Desk(ServerSpec(ONE), ServerSpec(TWO), manifests={ONE: "a b", TWO: "b"})
    desk.ask("r1", "a")
    desk.ask("r2", "b")
    desk.ask("r3", "a")
    desk.ask("r4", "b")
    out = desk.hear(ONE, None, "timed out")
    assert refused(out) == {"r3": "BackendUnavailable"}
    assert "timed out" in out[0].message
    assert out[0].extras == {"status": 502, "code": "upstream_connection_error"}
    assert refused(desk.ask("r5", "a")) == {"r5": "BackendUnavailable"}
    assert desk.server()["last_refresh_error"] == "timed out"
    assert desk.server()["available_models"] == []
    # What runs there goes on, and its slot is not free meanwhile.
    assert desk.server()["active_requests"] == 1
    assert desk.ledger.snapshot()["models"]["a"]["state"] == "failed"
    assert granted(desk.done("r2")) == {"r4": TWO}
    desk.done("r1")
    assert granted(desk.ask("r6", "b")) == {}
    assert granted(desk.hear(ONE, "a b")) == {"r6": ONE}
    assert desk.server()["last_refresh_error"] is None


def test_an_unreadable_manifest_without_a_reason_has_one_and_the_rest_is_ignored(caplog):
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"})
    desk.hear(ONE, None)
    assert "cannot be read" in str(desk.server()["last_refresh_error"])
    with caplog.at_level(logging.INFO):
        assert desk.hear("http://nobody", "a") == []
        assert desk.post(ServerManifest(ONE, ("a", 7))) == []  # type: ignore[arg-type]
        assert desk.post(ServerManifest(ONE, ["a"])) == []  # type: ignore[arg-type]
    assert desk.server()["is_up"] is False
    assert "http://nobody" in caplog.text


def test_a_suspect_gets_nothing_new_until_its_manifest_clears_or_condemns_it():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a"})
    desk.ask("r1", "a")
    assert desk.post(ServerSuspected(ONE)) == []
    assert desk.post(ServerSuspected(ONE)) == desk.post(ServerSuspected("http://nobody")) == []
    assert desk.ask("r2", "a") == []
    assert granted(desk.hear(ONE, "a")) == {"r2": ONE}
    desk.post(ServerSuspected(ONE))
    assert desk.ask("r3", "a") == []
    assert refused(desk.hear(ONE, None, "gone")) == {"r3": "BackendUnavailable"}


def test_a_model_that_a_server_offers_no_more_is_gone():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a b"})
    desk.ask("r1", "a")
    desk.ask("r2", "a")
    desk.ask("r3", "b")
    assert refused(desk.hear(ONE, "b")) == {"r2": "ModelNotFound"}
    assert desk.server()["current_model"] == "a"
    assert desk.ask("r4", "b") == []
    assert granted(desk.done("r1")) == {"r3": ONE}
    assert set(desk.ledger.snapshot()["models"]) == {"b"}
    desk.hear(ONE, "a b")
    assert desk.ask("r5", "a") == []


# --- turns ----------------------------------------------------------------------------------------------------------


def test_the_guard_never_mixes_models_on_a_server_that_loads_just_in_time():
    desk = Desk(ServerSpec(ONE, 4), manifests={ONE: "a b"})
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert desk.ask("r2", "b") == []
    assert granted(desk.ask("r3", "a")) == {"r3": ONE}
    desk.done("r1")
    assert desk.server()["current_model"] == "a"
    assert granted(desk.done("r3")) == {"r2": ONE}
    assert desk.server()["current_model"] == "b"


def test_a_server_that_runs_several_models_at_once_is_not_guarded():
    desk = Desk(ServerSpec(ONE, 2, just_in_time=False), manifests={ONE: "a b"})
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert granted(desk.ask("r2", "b")) == {"r2": ONE}
    assert {row["state"] for row in desk.ledger.snapshot()["models"].values()} == {"loaded"}
    desk.ask("r3", "a", priority=3)
    desk.ask("r4", "b", priority=1)
    assert granted(desk.done("r1")) == {"r4": ONE}


@pytest.mark.parametrize(("priority", "waited"), [(1, 30.0), (2, 60.0), (3, 120.0)])
def test_a_flow_on_one_model_starves_nobody_beyond_the_bound(priority, waited):
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b"})
    desk.ask("a0", "a", priority=priority)
    desk.ask("b", "b", priority=priority)
    number = 0
    while "b" not in desk.held:
        # Two requests for A overlap all the time: the server is never empty by itself.
        number += 1
        desk.ask(f"a{number}", "a", priority=priority)
        if f"a{number - 1}" in desk.held:
            desk.done(f"a{number - 1}", after=0.5)
        assert desk.now < 200
    # The server needs as long to run empty as its requests last.
    assert waited - 3.0 <= desk.held["b"].queue_wait_s <= waited
    assert desk.server()["current_model"] == "b"
    desk.done("b")
    assert f"a{number}" in desk.held


def test_a_request_that_would_time_out_has_half_of_its_time():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b"})
    desk.ask("a0", "a")
    desk.ask("b", "b", timeout=10.0)
    assert granted(desk.ask("a1", "a")) == {"a1": ONE}
    desk.done("a1", after=4.0)
    desk.now += 1.0
    assert desk.ask("a2", "a") == []
    assert granted(desk.done("a0", after=1.0)) == {"b": ONE}


def test_a_higher_class_closes_the_door_and_its_leaving_opens_it():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b"})
    desk.ask("a0", "a")
    desk.ask("b", "b", priority=1)
    assert desk.ask("a1", "a") == []
    assert granted(desk.post(RequestCancelled("b"))) == {"a1": ONE}
    desk.ask("b2", "b", priority=1, timeout=5.0)
    desk.done("a1")
    assert desk.ask("a2", "a") == []
    out = desk.post(Ticked(), after=5.0)
    assert refused(out) == {"b2": "BackendTimeout"}
    assert granted(out) == {"a2": ONE}


def test_an_empty_server_goes_on_with_its_model_for_a_while_after_a_swap():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a b"})
    desk.ask("a0", "a")
    desk.ask("b", "b")
    desk.now += 0.1
    desk.ask("a1", "a")
    desk.ask("a2", "a")
    assert granted(desk.done("a0", after=2.0)) == {"a1": ONE}
    assert granted(desk.done("a1", after=20.5)) == {"b": ONE}
    assert granted(desk.done("b", after=1.0)) == {"a2": ONE}


def test_without_batches_an_empty_server_serves_first_come_first_served():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a b"}, server_batch_s=0.0)
    desk.ask("a0", "a")
    desk.ask("b", "b")
    desk.now += 0.1
    desk.ask("a1", "a")
    assert granted(desk.done("a0")) == {"b": ONE}
    desk.ask("a2", "a", priority=3)
    desk.ask("b2", "b", priority=3)
    desk.ask("b3", "b", priority=1)
    assert granted(desk.done("b")) == {"b3": ONE}


def test_where_all_are_overdue_the_resident_keeps_its_place_for_a_turn_and_then_the_oldest_goes():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a b"}, bound_s=(0.0, 0.0, 0.0))
    desk.ask("a0", "a")
    for request, model in (("b0", "b"), ("a1", "a"), ("b1", "b"), ("a2", "a")):
        desk.ask(request, model)
        desk.now += 0.01
    order = []
    last = "a0"
    for _ in range(4):
        (last,) = granted(desk.done(last, after=1.0))
        order.append(last)
    # A has just settled; it keeps its place for twenty seconds, or until nobody waits for it.
    assert order == ["a1", "a2", "b0", "b1"]
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b"}, bound_s=(0.0, 0.0, 0.0), server_turn_s=1.0)
    desk.ask("a0", "a")
    desk.ask("a1", "a")
    desk.ask("b0", "b")
    desk.ask("a2", "a")
    assert granted(desk.done("a0", after=1.0)) == {"a2": ONE}
    desk.ask("a3", "a")
    assert granted(desk.done("a1", after=2.0)) == {}
    assert granted(desk.done("a2", after=1.0)) == {"b0": ONE}


def test_least_loaded_first_ties_in_turn_and_who_has_the_model_before_who_must_swap():
    desk = Desk(ServerSpec(ONE, 2), ServerSpec(TWO, 2), manifests={ONE: "a b", TWO: "a b"})
    assert [granted(desk.ask(f"r{n}", "a"))[f"r{n}"] for n in range(4)] == [ONE, TWO, ONE, TWO]
    desk.done("r0")
    assert granted(desk.ask("r4", "a")) == {"r4": ONE}
    for request in list(desk.held):
        desk.done(request)
    assert granted(desk.ask("b", "b")) == {"b": TWO}
    desk.done("b")
    assert granted(desk.ask("b1", "b")) == {"b1": TWO}
    desk.done("b1")
    assert granted(desk.ask("a1", "a")) == {"a1": ONE}


def test_a_server_that_others_need_is_left_to_them():
    desk = Desk(ServerSpec(ONE), ServerSpec(TWO), manifests={ONE: "a b", TWO: "a"})
    desk.ask("r1", "a")
    desk.ask("r2", "a")
    desk.ask("b", "b")
    desk.ask("r3", "a")
    desk.hear(TWO, None)
    desk.done("r1" if desk.held["r1"].replica == TWO else "r2")
    desk.hear(ONE, None)
    assert refused(desk.ask("r4", "b")) == {"r4": "BackendUnavailable"}
    first, second = Desk(ServerSpec(ONE), ServerSpec(TWO)), {}
    first.ask("r1", "a")
    first.ask("r2", "b")
    second.update(granted(first.hear(TWO, "a")))
    second.update(granted(first.hear(ONE, "a b")))
    assert second == {"r1": TWO, "r2": ONE}


def test_queue_bounds_and_deadlines_hold_but_a_free_slot_needs_no_queue():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a b"}, queue_max_size=0)
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert refused(desk.ask("r2", "a")) == {"r2": "QueueFull"}
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"}, queue_max_size=1)
    desk.ask("r1", "a")
    desk.ask("r2", "a", timeout=5.0)
    assert refused(desk.ask("r3", "a")) == {"r3": "QueueFull"}
    assert desk.ledger.next_deadline() == 5.0
    out = desk.post(Ticked(), after=5.0)
    assert refused(out) == {"r2": "BackendTimeout"}
    assert out[0].extras["phase"] == "queued"


def test_a_full_pool_refuses_what_no_server_offers():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"}, queue_max_size=0, models={"m": ModelSpec("m")})
    assert refused(desk.ask("r1", "m")) == {"r1": "QueueFull"}


# --- leases ---------------------------------------------------------------------------------------------------------


def test_a_lease_ends_once_however_it_ends():
    desk = Desk(ServerSpec(ONE, 3), manifests={ONE: "a"})
    for request in ("r1", "r2", "r3"):
        desk.ask(request, "a", holder=request)
    (again,) = desk.ask("r1", "a", holder="r1")
    assert again == desk.held["r1"]
    generation = again.generation
    assert desk.post(LeaseReleased("r1", generation + 100)) == []
    assert desk.server()["active_requests"] == 3
    desk.done("r1")
    desk.post(LeaseReleased("r1", generation))
    assert desk.server()["active_requests"] == 2
    desk.post(RequestCancelled("r2"))
    desk.post(RequestCancelled("r2"))
    assert desk.server()["active_requests"] == 1
    desk.ask("r4", "a", holder="r3")
    desk.post(HolderDied("r3"))
    assert desk.server()["active_requests"] == 0
    assert refused(desk.ask("r2", "a")) == {"r2": "BackendUnavailable"}


def test_a_lowered_limit_cuts_nothing_and_a_raised_one_grants_at_once():
    desk = Desk(ServerSpec(ONE, 3), manifests={ONE: "a"})
    for request in ("r1", "r2", "r3", "r4"):
        desk.ask(request, "a")
    desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=(ServerSpec(ONE, 1),))))
    assert desk.done("r1") == desk.done("r2") == []
    assert desk.server()["active_requests"] == 1
    out = desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=(ServerSpec(ONE, 2),))))
    assert granted(out) == {"r4": ONE}


def test_a_removed_server_finishes_what_it_has_and_may_come_back():
    desk = Desk(ServerSpec(ONE), ServerSpec(TWO), manifests={ONE: "a", TWO: "c"})
    desk.ask("r1", "a")
    desk.ask("r2", "a")
    only_two = dataclasses.replace(desk.spec, servers=(ServerSpec(TWO),))
    assert refused(desk.post(ConfigChanged(only_two))) == {"r2": "ModelNotFound"}
    assert desk.server()["active_requests"] == 1
    assert desk.hear(ONE, "a") == []
    desk.post(ConfigChanged(desk.spec))
    assert desk.ask("r3", "a") == []
    assert granted(desk.hear(ONE, "a")) == {}
    assert granted(desk.done("r1")) == {"r3": ONE}
    desk.post(ConfigChanged(only_two))
    desk.done("r3")
    assert [row["url"] for row in desk.ledger.snapshot()["servers"]] == [TWO]
    desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=())))
    assert desk.ledger.snapshot()["servers"] == []
    assert desk.ledger.snapshot()["models"] == {}


# --- beside replicas ------------------------------------------------------------------------------------------------


def test_a_server_takes_what_a_configured_model_has_no_free_replica_for():
    desk = Desk(
        ServerSpec(ONE),
        manifests={ONE: "m"},
        models={"m": ModelSpec("m", num_gpus=1, fallbacks=("x",)), "x": ModelSpec("x", num_gpus=1)},
        nodes={"n": NodeSpec("n", gpus=1)},
    )
    out = desk.ask("r1", "m")
    assert granted(out) == {"r1": ONE}
    assert SetDesired("m", 1) not in out
    assert SetDesired("m", 1) in desk.ask("r2", "m")
    desk.post(ReplicaStarted("m", "rep", "n"))
    assert granted(desk.post(ReplicaReady("rep"))) == {"r2": "rep"}
    assert desk.ledger.snapshot()["models"]["m"]["leases"] == 2
    assert desk.ask("r3", "m") == []
    assert granted(desk.done("r1")) == {"r3": ONE}
    # Out of the configuration, the model is the server's alone; its replica finishes and goes.
    without = dataclasses.replace(desk.spec, models={"x": desk.spec.models["x"]})
    assert SetDesired("m", 0) not in desk.post(ConfigChanged(without))
    assert SetDesired("m", 0) in desk.done("r2")
    assert desk.ledger.snapshot()["models"]["m"]["remote"] is True


def test_a_fallback_may_be_a_servers_model_and_a_dead_server_falls_back():
    desk = Desk(
        ServerSpec(ONE),
        manifests={ONE: "far"},
        models={"huge": ModelSpec("huge", num_gpus=9, fallbacks=("far",)), "near": ModelSpec("near", num_gpus=1)},
        nodes={"n": NodeSpec("n", gpus=1)},
    )
    desk.post(Ticked())
    (grant,) = desk.ask("r1", "huge")
    assert (grant.model, grant.replica) == ("far", ONE)


def test_a_model_that_left_the_configuration_while_a_server_was_down_comes_back_with_it():
    desk = Desk(ServerSpec(ONE), models={"m": ModelSpec("m", num_gpus=1)}, nodes={"n": NodeSpec("n", gpus=1)})
    desk.hear(ONE, None)
    desk.ask("r1", "m")
    desk.post(ReplicaStarted("m", "rep", "n"))
    desk.post(ReplicaReady("rep"))
    desk.post(ConfigChanged(dataclasses.replace(desk.spec, models={})))
    assert refused(desk.ask("r2", "m")) == {"r2": "ModelNotFound"}
    desk.hear(ONE, "m")
    assert granted(desk.ask("r3", "m")) == {"r3": ONE}


# --- a restart of the ledger ----------------------------------------------------------------------------------------


def reborn(**pool: object) -> Desk:
    desk = Desk(ServerSpec(ONE, 2), **pool)
    desk.ledger = Ledger(desk.spec, epoch="e2", now=0.0, recovering_until=2.0)
    return desk


def test_a_new_life_adopts_what_runs_before_it_grants():
    desk = reborn(models={"m": ModelSpec("m")})
    desk.post(LeaseReannounced("old", "h", "a", ONE, 7))
    desk.post(LeaseReannounced("old", "h", "a", ONE, 7))
    desk.post(LeaseReannounced("other", "h", "b", ONE, 8))
    assert desk.ask("r1", "b") == []
    assert desk.hear(ONE, "a b") == []
    out = desk.post(Ticked(), after=2.0)
    assert granted(out) == {}
    assert SetDesired("m", 0) in out
    assert SetDesired("a", 0) not in out
    assert desk.server()["current_model"] == "a"
    out = desk.post(LeaseReleased("old", 7), after=1.0)
    assert granted(out) == {"r1": ONE}
    assert desk.held["r1"].generation > 7
    # Its announcement comes a second time, and a third lease would not fit.
    desk.post(LeaseReannounced("old", "h", "a", ONE, 7))
    desk.ask("r2", "b")
    desk.post(LeaseReannounced("late", "h", "b", ONE, 9))
    assert desk.server()["active_requests"] == 2


def test_a_reannounced_lease_ends_its_own_wait_and_needs_a_living_holder():
    desk = reborn()
    desk.ask("r1", "a")
    desk.post(LeaseReannounced("r1", "h", "a", ONE, 3))
    desk.post(HolderDied("ghost"))
    desk.post(LeaseReannounced("r2", "ghost", "a", ONE, 4))
    desk.post(LeaseReannounced("r3", "h", "a", "some-replica", 5))
    assert desk.server()["active_requests"] == 1
    assert desk.post(Ticked(), after=2.0) == []
    assert granted(desk.hear(ONE, "a")) == {}
    desk.post(LeaseReleased("r1", 3))
    assert desk.server()["active_requests"] == 0


def test_no_lease_is_left_where_a_server_vanished_with_the_restart():
    desk = reborn()
    desk.ask("r1", "a")
    desk.hear(ONE, None, "gone")
    assert refused(desk.post(Ticked(), after=2.0)) == {"r1": "ModelNotFound"}


# --- the books ------------------------------------------------------------------------------------------------------


def test_check_finds_two_models_on_one_server():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b"})
    desk.ask("r1", "a")
    pool = desk.ledger._pool
    pool.servers.known[ONE].current = None
    with pytest.raises(AssertionError, match="current model"):
        desk.ledger.check()
    pool.servers.known[ONE].current = "a"
    desk.ledger.check()
    next(iter(pool.servers.leases.values())).model = "b"
    with pytest.raises(AssertionError):
        desk.ledger.check()


def test_the_books_show_themselves():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a"})
    desk.ask("r1", "a")
    assert repr(desk.ledger._pool.servers.known[ONE]) == "<Server http://one up 1/2 a>"
    desk.hear(ONE, None)
    assert "down" in repr(desk.ledger._pool.servers.known[ONE])
    assert desk.ledger._pool.servers.error("nobody's") == "its server is gone"
    assert desk.ledger._pool.servers.state("nobody's") is None
    lonely = Model(servers.remote_spec("a"), 0.0)
    assert server_turns._class(lonely) == 3
    assert server_turns._rank(lonely) == float("inf")


def storm(seed: int) -> None:
    """Hundreds of random events; the invariants are checked after each, and all that waits is served in the end."""
    rng = random.Random(seed)
    specs = tuple(ServerSpec(f"http://{n}", rng.randint(1, 3), rng.random() < 0.7) for n in range(3))
    desk = Desk(
        *specs, queue_max_size=30, bound_s=(1.0, 2.0, 4.0), server_batch_s=rng.choice((0.0, 0.5)), server_turn_s=0.5
    )
    models = [f"m{n}" for n in range(4)]
    waits: list[float] = []
    refusals = 0
    for number in range(400):
        desk.now += rng.expovariate(20.0)
        dice = rng.random()
        if dice < 0.45:
            out = desk.ask(f"r{number}", rng.choice(models), rng.randint(1, 3), rng.choice((0.5, 5.0, 50.0)))
        elif dice < 0.8 and desk.held:
            out = desk.done(rng.choice(list(desk.held)), after=0.0)
        elif dice < 0.87:
            name = f"r{rng.randrange(number + 1)}"
            desk.held.pop(name, None)
            out = desk.post(RequestCancelled(name))
        elif dice < 0.95:
            offer = rng.sample(models, rng.randint(1, 4)) if rng.random() < 0.8 else None
            out = desk.hear(rng.choice(specs).url, None if offer is None else " ".join(offer))
        else:
            changed = tuple(dataclasses.replace(each, max_concurrent=rng.randint(1, 3)) for each in specs)
            out = desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=changed[: rng.randint(2, 3)])))
        waits += [each.queue_wait_s for each in out if isinstance(each, Grant)]
        refusals += len(refused(out))
    desk.post(ConfigChanged(desk.spec))
    for spec in specs:
        desk.hear(spec.url, " ".join(models))
    while desk.ledger.snapshot()["queued"] or desk.held:
        assert desk.held, "somebody waits for ever"
        desk.done(next(iter(desk.held)), after=0.1)
    snapshot = desk.ledger.snapshot()
    assert (snapshot["leases"], snapshot["queued"]) == (0, 0)
    assert snapshot["submitted"] == snapshot["finished"] + snapshot["rejected"]
    assert waits


@pytest.mark.parametrize("seed", range(40))
def test_random_events_never_break_the_guard_and_end_in_order(seed):
    storm(seed)


def _no_guard(pool, server, now):
    return next((pool.models[name] for name in server.models if pool.models[name].queue.count), None)


def _no_turns(pool, server, now):
    waiting = (pool.models[name] for name in server.models if pool.models[name].queue.count)
    return next((model for model in waiting if server.last in (None, model.name)), None)


def _forgets_to_count(pool, lease):
    lease.server.take(lease, 0)


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (server_turns, "next_model", _no_guard),
        (server_turns, "next_model", _no_turns),
        (servers.Server, "is_busy", property(lambda self: False)),
        (servers.Server, "is_up", property(lambda self: True, lambda self, value: None)),
        (servers, "hold", _forgets_to_count),
    ],
)
def test_the_random_events_find_planted_bugs(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(10):
            storm(seed)
