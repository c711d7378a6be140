"""Whose turn it is on an external server: the just-in-time guard, bounds, batches, the choice of a server."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    RequestCancelled,
    Ticked,
)
from cluster.ledger.specs import ModelSpec, ServerSpec
from tests.unit.ledger.server_desk import ONE, TWO, Desk, granted, refused

# --- turns ----------------------------------------------------------------------------------------------------------


def test_the_guard_never_mixes_models_on_a_server_that_loads_just_in_time():
    desk = Desk(ServerSpec(ONE, 4), manifests={ONE: "a b"})
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert desk.ask("r2", "b") == []
    assert granted(desk.ask("r3", "a")) == {"r3": ONE}
    desk.done("r1")
    assert desk.server().current_model == "a"
    assert granted(desk.done("r3")) == {"r2": ONE}
    assert desk.server().current_model == "b"


def test_a_server_that_runs_several_models_at_once_is_not_guarded():
    desk = Desk(ServerSpec(ONE, 2, just_in_time=False), manifests={ONE: "a b"})
    assert granted(desk.ask("r1", "a")) == {"r1": ONE}
    assert granted(desk.ask("r2", "b")) == {"r2": ONE}
    assert {row.state for row in desk.ledger.snapshot().models.values()} == {"loaded"}
    desk.ask("r3", "a", priority=3)
    desk.ask("r4", "b", priority=1)
    assert granted(desk.done("r1")) == {"r4": ONE}


@pytest.mark.parametrize(("priority", "waited"), [(1, 15.0), (2, 40.0), (3, 100.0)])
def test_a_flow_on_one_model_starves_nobody_beyond_the_bound(priority, waited):
    """Where none is configured, it fits the load that is assumed of a model that was never loaded, 5 s."""
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
    assert desk.server().current_model == "b"
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


def test_a_higher_class_drains_the_server_and_its_leaving_reopens_it():
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
