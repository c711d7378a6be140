"""External servers in the pure ledger: manifests, leases, configuration, restarts, the books."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from cluster.ledger.books import servers
from cluster.ledger.books.records import Model
from cluster.ledger.events import (
    ConfigChanged,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    LoadRequested,
    ReplicaReady,
    ReplicaStarted,
    RequestCancelled,
    ServerManifest,
    ServerSuspected,
    SetDesired,
    Ticked,
)
from cluster.ledger.handlers import server_slots
from cluster.ledger.ledger import Ledger
from cluster.ledger.rules import server_turns
from cluster.ledger.specs import ModelSpec, NodeSpec, ServerSpec
from tests.unit.ledger.server_desk import ONE, TWO, Desk, granted, refused

# --- manifests ------------------------------------------------------------------------------------------------------


def test_a_manifest_makes_models_known_and_its_slots_are_granted():
    desk = Desk(ServerSpec(ONE, 2), manifests={ONE: "a b a"})
    assert desk.server().available_models == ("a", "b")
    assert desk.server().current_model is None
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert granted(desk.ask("r2", "a")) == {"r2": ONE}
    assert [desk.held[each].slots for each in ("r1", "r2")] == [(0,), (1,)]
    row = desk.server()
    assert (row.active_requests, row.current_model, row.is_busy) == (2, "a", True)
    assert desk.ask("r3", "a") == []
    assert granted(desk.done("r1")) == {"r3": ONE}
    assert desk.held["r3"].slots == (0,)
    assert desk.held["r3"].queue_wait_s == 1.0
    desk.done("r2")
    desk.done("r3")
    assert desk.server().current_model is None
    snapshot = desk.ledger.snapshot()
    assert (snapshot.leases, snapshot.queued, snapshot.finished) == (0, 0, 3)
    assert {name: row.state for name, row in snapshot.models.items()} == {"a": "loaded", "b": "unloaded"}
    assert snapshot.models["a"].remote is True


def test_no_replica_is_ever_wanted_for_a_servers_model():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"}, nodes={"n": NodeSpec("n", gpus=1)})
    for request in ("r1", "r2", "r3"):
        assert not [each for each in desk.ask(request, "a") if isinstance(each, SetDesired)]
    assert desk.ledger.desired == {"a": 0}


def test_no_operator_loads_what_a_server_loads_by_itself():
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"})
    (refusal,) = desk.post(LoadRequested("a", 1))
    assert (refusal.error, refusal.extras["code"]) == ("InvalidRequest", "invalid_load_request")


def test_requests_before_the_first_manifest_wait_for_it():
    desk = Desk(ServerSpec(ONE), ServerSpec(TWO))
    assert desk.ask("r1", "a") == desk.ask("r2", "x") == []
    assert granted(desk.hear(ONE, "a")) == {"r1": ONE}
    assert desk.ask("r3", "x") == []
    out = desk.hear(TWO, None, "connection refused")
    assert refused(out) == {"r2": "ModelNotFound", "r3": "ModelNotFound"}
    assert out[0].extras["available_models"] == ["a"]
    assert refused(desk.ask("r4", "x")) == {"r4": "ModelNotFound"}
    assert set(desk.ledger.snapshot().models) == {"a"}


def test_only_so_many_unheard_of_models_are_waited_for(monkeypatch):
    monkeypatch.setattr(server_slots, "MAX_EXPECTED", 1)
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
    assert desk.server().last_refresh_error == "timed out"
    assert desk.server().available_models == ()
    # What runs there goes on, and its slot is not free meanwhile.
    assert desk.server().active_requests == 1
    assert desk.ledger.snapshot().models["a"].state == "failed"
    assert granted(desk.done("r2")) == {"r4": TWO}
    desk.done("r1")
    assert granted(desk.ask("r6", "b")) == {}
    assert granted(desk.hear(ONE, "a b")) == {"r6": ONE}
    assert desk.server().last_refresh_error is None


def test_an_unreadable_manifest_without_a_reason_has_one_and_the_rest_is_ignored(caplog):
    desk = Desk(ServerSpec(ONE), manifests={ONE: "a"})
    desk.hear(ONE, None)
    assert "cannot be read" in str(desk.server().last_refresh_error)
    with caplog.at_level(logging.INFO, "cluster.ledger"):
        assert desk.hear("http://nobody", "a") == []
        assert desk.post(ServerManifest(ONE, ("a", 7))) == []  # type: ignore[arg-type]
        assert desk.post(ServerManifest(ONE, ["a"])) == []  # type: ignore[arg-type]
    assert desk.server().is_up is False
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
    assert desk.server().current_model == "a"
    assert desk.ask("r4", "b") == []
    assert granted(desk.done("r1")) == {"r3": ONE}
    assert set(desk.ledger.snapshot().models) == {"b"}
    desk.hear(ONE, "a b")
    assert desk.ask("r5", "a") == []


# --- leases ---------------------------------------------------------------------------------------------------------


def test_a_lease_ends_once_however_it_ends():
    desk = Desk(ServerSpec(ONE, 3), manifests={ONE: "a"})
    for request in ("r1", "r2", "r3"):
        desk.ask(request, "a", holder=request)
    (again,) = desk.ask("r1", "a", holder="r1")
    assert again == desk.held["r1"]
    generation = again.generation
    assert desk.post(LeaseReleased("r1", generation + 100)) == []
    assert desk.server().active_requests == 3
    desk.done("r1")
    desk.post(LeaseReleased("r1", generation))
    assert desk.server().active_requests == 2
    desk.post(RequestCancelled("r2"))
    desk.post(RequestCancelled("r2"))
    assert desk.server().active_requests == 1
    desk.ask("r4", "a", holder="r3")
    desk.post(HolderDied("r3"))
    assert desk.server().active_requests == 0
    assert refused(desk.ask("r2", "a")) == {"r2": "BackendUnavailable"}


def test_a_lowered_limit_cuts_nothing_and_a_raised_one_grants_at_once():
    desk = Desk(ServerSpec(ONE, 3), manifests={ONE: "a"})
    for request in ("r1", "r2", "r3", "r4"):
        desk.ask(request, "a")
    desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=(ServerSpec(ONE, 1),))))
    assert desk.done("r1") == desk.done("r2") == []
    assert desk.server().active_requests == 1
    out = desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=(ServerSpec(ONE, 2),))))
    assert granted(out) == {"r4": ONE}


def test_a_removed_server_finishes_what_it_has_and_may_come_back():
    desk = Desk(ServerSpec(ONE), ServerSpec(TWO), manifests={ONE: "a", TWO: "c"})
    desk.ask("r1", "a")
    desk.ask("r2", "a")
    only_two = dataclasses.replace(desk.spec, servers=(ServerSpec(TWO),))
    assert refused(desk.post(ConfigChanged(only_two))) == {"r2": "ModelNotFound"}
    assert desk.server().active_requests == 1
    assert desk.hear(ONE, "a") == []
    desk.post(ConfigChanged(desk.spec))
    assert desk.ask("r3", "a") == []
    assert granted(desk.hear(ONE, "a")) == {}
    assert granted(desk.done("r1")) == {"r3": ONE}
    desk.post(ConfigChanged(only_two))
    desk.done("r3")
    assert [row.url for row in desk.ledger.snapshot().servers] == [TWO]
    desk.post(ConfigChanged(dataclasses.replace(desk.spec, servers=())))
    assert desk.ledger.snapshot().servers == ()
    assert desk.ledger.snapshot().models == {}


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
    assert desk.ledger.snapshot().models["m"].leases == 2
    assert desk.ask("r3", "m") == []
    assert granted(desk.done("r1")) == {"r3": ONE}
    # Out of the configuration, the model is the server's alone; its replica finishes and goes.
    without = dataclasses.replace(desk.spec, models={"x": desk.spec.models["x"]})
    assert SetDesired("m", 0) not in desk.post(ConfigChanged(without))
    assert SetDesired("m", 0) in desk.done("r2")
    assert desk.ledger.snapshot().models["m"].remote is True


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


def reborn(slots: int = 2, **pool: object) -> Desk:
    desk = Desk(ServerSpec(ONE, slots), **pool)
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
    assert desk.server().current_model == "a"
    out = desk.post(LeaseReleased("old", 7), after=1.0)
    assert granted(out) == {"r1": ONE}
    assert desk.held["r1"].generation > 7
    # Its announcement comes a second time. One that is late is a stream all the same, and counts beside the others.
    desk.post(LeaseReannounced("old", "h", "a", ONE, 7))
    desk.ask("r2", "b")
    desk.post(LeaseReannounced("late", "h", "b", ONE, 9))
    assert desk.server().active_requests == 3
    assert granted(desk.ask("r3", "b")) == {}
    desk.post(LeaseReannounced("other", "h", "a", ONE, 10))
    assert desk.server().active_requests == 3, "it was cut when the model was swapped"


def test_a_new_life_with_a_lower_limit_counts_all_that_still_runs():
    desk = reborn(slots=1)
    desk.post(LeaseReannounced("old1", "h", "a", ONE, 7))
    desk.post(LeaseReannounced("old2", "h", "a", ONE, 8))
    desk.hear(ONE, "a b")
    desk.ask("r1", "b")
    assert granted(desk.post(Ticked(), after=2.0)) == {}
    assert granted(desk.post(LeaseReleased("old1", 7), after=1.0)) == {}, "the second stream still runs on a"
    assert granted(desk.post(LeaseReleased("old2", 8), after=1.0)) == {"r1": ONE}


def test_a_reannounced_lease_ends_its_own_wait_and_needs_a_living_holder():
    desk = reborn()
    desk.ask("r1", "a")
    desk.post(LeaseReannounced("r1", "h", "a", ONE, 3))
    desk.post(HolderDied("ghost"))
    desk.post(LeaseReannounced("r2", "ghost", "a", ONE, 4))
    desk.post(LeaseReannounced("r3", "h", "a", "some-replica", 5))
    assert desk.server().active_requests == 1
    assert desk.post(Ticked(), after=2.0) == []
    assert granted(desk.hear(ONE, "a")) == {}
    desk.post(LeaseReleased("r1", 3))
    assert desk.server().active_requests == 0


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
    assert server_turns.rank(lonely) == float("inf")
