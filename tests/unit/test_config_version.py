"""Changes of the configuration at run time: each gives a new version, checked as a whole, and touches nothing else."""

from __future__ import annotations

import pickle

import pytest

from cluster.config import ConfigError, Configuration, load_config
from cluster.config.version import (
    IdTaken,
    NoSuchModel,
    merged,
    overridden,
    patched,
    reloaded,
    with_model,
    with_overrides,
    without_model,
)

MODELS = {
    "a": {"backend": "fake", "aliases": ["first"], "replica_max": 2, "engine_kwargs": {"tokens": 3}},
    "b": {"backend": "llama_cpp", "model_path": "/b.gguf", "gguf_n_ctx": 512, "idle_timeout": 7},
}


def pool(models=MODELS, **keys):
    return load_config({"models": models, **keys}, environ={})


def deployed(at=1.0, models=MODELS, **keys):
    return Configuration((at, 0), pool(models, **keys))


def test_a_model_is_registered_in_an_application_of_its_own():
    before = deployed()
    after = with_model(before, "c", {"backend": "fake", "replicas": 1})
    assert after.version == (1.0, 1) > before.version
    assert after.pool.models["c"].min_replicas == 1
    assert (after.runtime, after.registered) == ({"c"}, {"c"})
    assert list(before.pool.models) == ["a", "b"]
    assert {name: after.pool.models[name] for name in MODELS} == before.pool.models


@pytest.mark.parametrize("taken", ["a", "first"])
def test_a_taken_id_is_a_conflict(taken):
    with pytest.raises(IdTaken, match="is taken"):
        with_model(deployed(), taken, {"backend": "fake"})


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("c", {"backend": "fake", "target_inflihgt": 3}, "did you mean 'target_inflight'"),
        ("c", {"backend": "nothing"}, "backend"),
        ("c", {"backend": "fake", "num_gpus": -1}, "num_gpus"),
        ("c", {"backend": "llama_cpp"}, "model_path is required"),
        ("c", {"backend": "fake", "aliases": ["a"]}, "already a model id"),
        ("", {"backend": "fake"}, "id: "),
        ("x" * 201, {"backend": "fake"}, "id: "),
        ("c\n", {"backend": "fake"}, "id: "),
    ],
)
def test_what_cannot_be_registered(model, keys, message):
    before = deployed()
    with pytest.raises(ConfigError, match=message):
        with_model(before, model, keys)
    assert before == deployed()


def test_ids_that_serve_cannot_tell_apart():
    with pytest.raises(ConfigError, match="Ray Serve"):
        with_model(with_model(deployed(), "c/d", {"backend": "fake"}), "c#d", {"backend": "fake"})


def test_a_patch_changes_its_keys_and_null_is_the_default():
    after = patched(deployed(), "b", {"gguf_n_ctx": None, "idle_timeout": 0, "max_replicas": 3})
    model = after.pool.models["b"]
    assert (model.gguf_n_ctx, model.idle_timeout, model.max_replicas) == (None, 0, 3)
    assert model.model_path == "/b.gguf"
    assert after.runtime == frozenset()
    assert patched(after, "b", {"replica_max": None}).pool.models["b"].max_replicas == 1


def test_only_keys_of_the_engine_change_the_revision():
    before = deployed()
    assert patched(before, "b", {"idle_timeout": 9}).pool.models["b"].revision == before.pool.models["b"].revision
    assert patched(before, "b", {"gguf_n_ctx": 9}).pool.models["b"].revision != before.pool.models["b"].revision


def test_another_amount_of_the_machine_is_another_application():
    after = patched(deployed(), "a", {"num_gpus": 0.5})
    assert after.runtime == {"a"}
    assert after.registered == frozenset()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gguf_n_cxt": 3}, "did you mean 'gguf_n_ctx'"),
        ({"nonsense": None}, "unknown key"),
        ({"replica_max": 2, "max_replicas": 2}, "another name of"),
        ({"replicas": 5}, "replica_max"),
        ({"model_path": None}, "model_path is required"),
        ({"gguf_n_ctx": "many"}, "gguf_n_ctx"),
    ],
)
def test_a_bad_patch_changes_nothing(keys, message):
    before = deployed()
    with pytest.raises(ConfigError, match=message):
        patched(before, "b", keys)
    assert before == deployed()


def test_another_backend_reads_the_engine_kwargs_anew():
    with pytest.raises(ConfigError, match="tokens"):
        patched(deployed(), "a", {"backend": "llama_cpp", "model_path": "/a.gguf"})
    keys = {"backend": "llama_cpp", "model_path": "/a.gguf", "engine_kwargs": None}
    assert patched(deployed(), "a", keys).pool.models["a"].format == "gguf"


def test_a_model_is_removed():
    after = without_model(with_model(deployed(), "c", {"backend": "fake"}), "c")
    assert (list(after.pool.models), after.runtime, after.registered) == (["a", "b"], frozenset(), frozenset())
    assert after.version == (1.0, 2)
    with pytest.raises(NoSuchModel):
        without_model(after, "c")
    with pytest.raises(NoSuchModel):
        patched(after, "c", {})


@pytest.mark.parametrize(
    ("keys", "models"),
    [({"default_model": "first"}, MODELS), ({}, {**MODELS, "b": {**MODELS["b"], "fallbacks": ["a"]}})],
)
def test_a_model_that_another_key_names_stays(keys, models):
    with pytest.raises(ConfigError, match=r"default_model|fallbacks"):
        without_model(deployed(models=models, **keys), "a")


def test_a_pool_on_cpus_stays_on_them():
    after = with_model(deployed(execution_mode="cpu"), "c", {"backend": "fake", "num_gpus": 1})
    assert after.pool.models["c"].num_gpus == 0


def test_estimates_of_unchanged_models_are_kept():
    before = deployed()
    before = before._replace(pool=before.pool.with_estimates({"a": 5, "b": 6}))
    after = patched(with_model(before, "c", {"backend": "fake"}), "b", {"gguf_n_ctx": 9})
    assert [after.pool.estimate_mib(name) for name in "abc"] == [5, None, None]
    assert pickle.loads(pickle.dumps(after)).pool.estimate_mib("a") == 5


def test_overrides_hold_until_they_are_taken_back():
    after = with_overrides(deployed(), "b", {"gguf_n_ctx": None})
    assert after.overrides == {"b": {"gguf_n_ctx": None}}
    assert after.pool.models == deployed().pool.models
    assert with_overrides(after, "b", None).overrides == {}
    assert without_model(after, "b").overrides == {}


def test_overridden_is_what_the_load_runs():
    model = pool({**MODELS, "b": {**MODELS["b"], "aliases": ["second"], "fallbacks": ["a"]}}).models["b"]
    changed = overridden(model, {"gguf_n_ctx": None, "gguf_type_k": "q8_0"})
    assert (changed.gguf_n_ctx, changed.gguf_type_k) == (None, "q8_0")
    assert (changed.aliases, changed.fallbacks, changed.idle_timeout) == (("second",), ("a",), 7)
    assert changed.revision != model.revision
    with pytest.raises(ConfigError, match="gguf_n_ctx"):
        overridden(model, {"gguf_n_ctx": 0})


def test_a_file_that_is_read_again_wins_and_registered_models_stay():
    before = with_model(patched(deployed(), "b", {"idle_timeout": 1}), "c", {"backend": "fake"})
    again = {"b": {**MODELS["b"], "num_cpus": 1}, "d": {"backend": "fake"}}
    after = reloaded(before, pool(again))
    assert list(after.pool.models) == ["b", "d", "c"]
    assert after.pool.models["b"].idle_timeout == 7
    assert (after.runtime, after.registered) == ({"b", "c", "d"}, {"c"})
    assert after.version == (1.0, 3)
    assert list(reloaded(after, pool()).pool.models) == ["a", "b", "c"]


def test_the_newest_deploy_wins_and_takes_over_what_was_registered():
    before = with_model(patched(deployed(1.0), "b", {"idle_timeout": 1}), "c", {"backend": "fake"})
    fresh = deployed(2.0, {"a": MODELS["a"]})
    for after in (merged(before, fresh), merged(fresh, before)):
        assert after.version == (2.0, 1)
        assert list(after.pool.models) == ["a", "c"]
        assert (after.runtime, after.registered) == ({"c"}, {"c"})
        assert merged(after, before) == after
        assert merged(fresh, after) == after


def test_a_registered_model_gives_way_to_a_deploy_that_names_it_or_leaves_it_no_name():
    before = with_model(deployed(1.0), "c", {"backend": "fake", "aliases": ["third"]})
    named = merged(before, deployed(2.0, {"c": {"backend": "fake", "idle_timeout": 3}}))
    assert (named.pool.models["c"].idle_timeout, named.runtime, named.registered) == (3, {"c"}, frozenset())
    taken = merged(before, deployed(2.0, {"third": {"backend": "fake"}}))
    assert list(taken.pool.models) == ["third"]


def test_the_same_deploy_keeps_its_changes():
    before = with_model(deployed(1.0), "c", {"backend": "fake"})
    assert merged(before, deployed(1.0)) == before


def test_a_request_names_no_interpreter_that_the_pool_does_not_run():
    fake = {"backend": "fake"}
    before = deployed(models={"a": {**fake, "python": "/venv/bin/python"}, "b": fake})
    known, strange = {"python": "/venv/bin/python"}, {"python": "/tmp/upload"}
    assert with_model(before, "c", {**fake, **known}).pool.models["c"].python == known["python"]
    assert patched(before, "b", known).pool.models["b"].python == known["python"]
    for change in (lambda: with_model(before, "c", {**fake, **strange}), lambda: patched(before, "b", strange)):
        with pytest.raises(ConfigError, match="python: "):
            change()
    assert patched(before, "a", {"idle_timeout": 9}).pool.models["a"].idle_timeout == 9
