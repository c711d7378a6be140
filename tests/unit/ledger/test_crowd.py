"""Several models wait for one place: the first gets it so early that the last keeps its bound, too."""

from __future__ import annotations

import pytest

from tests.unit.ledger.desk import Desk, model

STEP_S = 0.25
# What one model takes from the others: its load as it is assumed at first. Drains and loads are planned with a lead.
LOAD_S, LEAD = 5.0, 1.5


def drained_at(*waiting: str, **pool: object) -> float:
    """When A, which never pauses, is drained for the sake of these models, one request each from 10 s on."""
    desk = Desk(
        *(model(name, slots=2, num_gpus=0.5 if name == "H" else 1.0) for name in "ABCDEFH"),
        bound_s=(60.0, 60.0, 60.0),
        min_residency_s=1e9,
        **pool,
    )
    desk.warm("A", "A#1")
    desk.arrive("a", "A")
    if pool:
        desk.warm("B", "B#1")
        desk.arrive("b", "B")
    desk.now = 10.0
    for name in waiting:
        desk.arrive(name, name)
    while desk.now < 100.0:
        if "quiesce A#1" in desk.at(desk.now + STEP_S):
            return desk.now
    raise AssertionError("A was never drained")


def test_one_alone_has_its_place_within_its_bound() -> None:
    assert drained_at("C") == pytest.approx(70.0 - LEAD * LOAD_S, abs=STEP_S)


def test_the_first_of_three_leaves_the_others_their_time() -> None:
    assert drained_at("C", "D", "E") == pytest.approx(70.0 - LEAD * 3 * LOAD_S, abs=2 * STEP_S)


def test_two_places_side_by_side_take_half_of_the_time() -> None:
    assert drained_at("C", "D", "E", gpus=2) == pytest.approx(70.0 - LEAD * 2 * LOAD_S, abs=2 * STEP_S)


def test_who_is_served_already_and_wants_more_is_not_of_the_crowd() -> None:
    desk = Desk(model("A"), model("B", max_replicas=2), model("C"), gpus=2, bound_s=(60.0,) * 3, min_residency_s=1e9)
    desk.warm("A", "A#1")
    desk.warm("B", "B#1")
    for request in ("a", "b", "b2", "c"):
        desk.arrive(request, request[0].upper())
    quiesced = {}
    while desk.now < 70.0:
        quiesced |= {each: desk.now for each in desk.at(desk.now + STEP_S) if each.startswith("quiesce")}
    (when,) = quiesced.values()
    assert when == pytest.approx(60.0 - LEAD * LOAD_S, abs=2 * STEP_S)
