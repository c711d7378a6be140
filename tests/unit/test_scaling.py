"""The policy that Serve calls: it says only what should change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster import effects, scaling
from cluster.scaling import HURRY_S, LONGEST_HURRY_S, LedgerPolicy


class Key(str):
    """A deployment's id as Serve passes it: hashable, with a name."""

    @property
    def name(self):
        return str(self)


@pytest.fixture(autouse=True)
def paces(monkeypatch):
    """Whether Serve's controller was told to hurry, at each call."""
    paces = []
    monkeypatch.setattr(effects, "pace_controller", lambda *, hurry: paces.append(hurry))
    return paces


def decide(desired, policy=None, running=(), **targets):
    if policy is None:
        policy = new_policy()
    policy._desired = desired
    running = dict(running)
    contexts = {
        Key(name): SimpleNamespace(target_num_replicas=count, current_num_replicas=running.get(name, count))
        for name, count in targets.items()
    }
    return policy(contexts)[0]


def new_policy():
    """A policy without the thread that follows a ledger."""
    policy = LedgerPolicy.__new__(LedgerPolicy)
    policy._changed_at = 0.0
    return policy


def test_without_a_ledger_nothing_changes():
    assert decide(None, a=1, b=0) == {}


def test_only_changes_are_named():
    assert decide({"a": 1, "b": 2}, a=1, b=1) == {"b": 2}


def test_an_unused_model_is_not_named_so_that_serve_does_not_start_it_by_itself():
    assert decide({"a": 0}, a=0, b=0) == {}


def test_a_model_that_should_go_is_named():
    assert decide({}, a=1) == {"a": 0}


def test_the_controller_hurries_from_a_change_until_what_should_run_does(monkeypatch, paces):
    now = 100.0
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: now))
    policy = new_policy()
    decide({"a": 1}, policy, a=1)
    decide({"a": 0, "b": 1}, policy, a=1, b=0)
    starting = {"b": 0}
    now += HURRY_S + 0.1
    decide({"a": 0, "b": 1}, policy, starting, a=0, b=1)
    decide({"a": 0, "b": 1}, policy, a=0, b=1)
    now = 100.0 + LONGEST_HURRY_S + 0.1
    decide({"a": 0, "b": 1}, policy, starting, a=0, b=1)
    assert paces == [False, True, True, False, False]
