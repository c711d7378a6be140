"""The policy that Serve calls: the ledger's count, exactly, and never a word of its own."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster import follower as following
from cluster.applications import GRAPH, application_of, own_applications
from cluster.config import Configuration, load_config
from cluster.config.version import patched, with_model, without_model
from cluster.follower import Counts, Follower
from cluster.scaling import LedgerPolicy, is_ours

CONFIG = AutoscalingConfig(
    min_replicas=0,
    max_replicas=1024,
    upscale_delay_s=0,
    downscale_delay_s=0,
    downscale_to_zero_delay_s=0,
    policy=AutoscalingPolicy(policy_function="cluster.scaling:LedgerPolicy", policy_kwargs={"model": "a"}),
)


@pytest.fixture
def follower(monkeypatch):
    """The follower of this process, which follows nothing."""
    follower = Follower()
    monkeypatch.setattr(following, "follower", lambda: follower)
    monkeypatch.setattr(autoscaling_policy, "_get_cold_start_scale_up_replicas", lambda context: 1)
    return follower


def context(target, running=None, application=GRAPH, config=CONFIG):
    return SimpleNamespace(
        app_name=application,
        deployment_id=f"{application}#a",
        target_num_replicas=target,
        current_num_replicas=target if running is None else running,
        total_num_requests=5,
        policy_state={},
        config=config,
    )


def served(policy, context):
    """What Serve makes of a policy's answer."""
    return autoscaling_policy._apply_autoscaling_config(policy)(context)[0]


def test_without_word_from_a_ledger_nothing_changes(follower):
    assert LedgerPolicy("a")(context(2)) == (2, {})


@pytest.mark.parametrize("target", [0, 1, 3])
@pytest.mark.parametrize("wanted", [1, 2, 900])
def test_serve_does_what_the_ledger_wants(follower, target, wanted):
    follower.counts = Counts({"a": wanted}, {"a": GRAPH})
    assert served(LedgerPolicy("a"), context(target)) == wanted


@pytest.mark.parametrize("counts", [Counts({"a": 0}, {"a": GRAPH}), Counts({}, {"a": GRAPH}), Counts({}, {})])
def test_stale_request_counts_start_nothing(follower, counts):
    follower.counts = counts
    assert served(LedgerPolicy("a"), context(0)) == 0


def test_other_applications_of_the_cluster_start_as_ever(follower):
    LedgerPolicy("a")
    LedgerPolicy("b")
    others = AutoscalingConfig(min_replicas=0, max_replicas=3)
    assert not is_ours(context(0, config=others))
    assert served(lambda _: (0, {}), context(0, config=others)) == 1


def test_serve_sends_the_policy_to_its_controller_by_value():
    sent = CONFIG.policy.get_serialized_policy_def()
    assert pickle.loads(sent).__name__ == "LedgerPolicy"


def test_only_the_application_in_which_a_model_lives_has_its_replicas():
    follower = Follower()
    follower.counts = Counts({"a": 2}, {"a": "slotpool-model-a-1-0"})
    assert follower.wanted("slotpool-model-a-1-0", "a") == 2
    assert follower.wanted(GRAPH, "a") == 0


class Ledger:
    """Answers `desired` and `config` from lists, and is then lost."""

    def __init__(self, *answers):
        self.desired = SimpleNamespace(remote=lambda seen, timeout_s: answers[seen + 1][0])
        self.config = SimpleNamespace(remote=lambda seen: self.now)
        self.answers = answers
        self.now = None

    def get(self, answer, timeout):
        if isinstance(answer, Configuration):
            return answer
        version, counts = answer
        self.now = self.answers[version][1]
        return version, counts


def test_the_follower_knows_where_a_model_is_and_where_a_removed_one_was(monkeypatch):
    deployed = Configuration((1.0, 0), load_config({"models": {"a": {"backend": "fake"}}}, environ={}))
    registered = with_model(deployed, "b", {"backend": "fake", "num_gpus": 0.5})
    ledger = Ledger(((0, {"a": 1, "b": 1}), registered), ((1, {"a": 1, "b": 1}), without_model(registered, "b")))
    monkeypatch.setattr(following, "ray", SimpleNamespace(get=ledger.get))
    follower = Follower()
    with pytest.raises(IndexError):
        follower.follow(ledger)
    assert follower.counts == Counts({"a": 1, "b": 1}, {"a": GRAPH, "b": "slotpool-model-b-0.5-0"})


def test_an_application_is_named_after_its_model_and_size():
    deployed = Configuration((1.0, 0), load_config({"models": {"a/b": {"backend": "fake"}}}, environ={}))
    assert application_of(deployed, "a/b") == GRAPH
    assert own_applications(deployed) == {}
    moved = patched(deployed, "a/b", {"num_gpus": 0.25, "num_cpus": 2})
    assert own_applications(moved) == {"slotpool-model-a-b-0.25-2": "a/b"}
