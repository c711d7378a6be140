"""The policy that Serve calls: it says only what should change."""

from __future__ import annotations

from types import SimpleNamespace

from cluster.scaling import LedgerPolicy


class Key(str):
    """A deployment's id as Serve passes it: hashable, with a name."""

    @property
    def name(self):
        return str(self)


def decide(desired, **targets):
    policy = LedgerPolicy.__new__(LedgerPolicy)
    policy._desired = desired
    return policy({Key(name): SimpleNamespace(target_num_replicas=count) for name, count in targets.items()})[0]


def test_without_a_ledger_nothing_changes():
    assert decide(None, a=1, b=0) == {}


def test_only_changes_are_named():
    assert decide({"a": 1, "b": 2}, a=1, b=1) == {"b": 2}


def test_an_unused_model_is_not_named_so_that_serve_does_not_start_it_by_itself():
    assert decide({"a": 0}, a=0, b=0) == {}


def test_a_model_that_should_go_is_named():
    assert decide({}, a=1) == {"a": 0}
