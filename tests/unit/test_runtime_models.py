"""Changes of the configuration through one ingress: compare, set, try again, and bring Serve's applications in line."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from cluster import errors
from cluster.applications import GRAPH
from cluster.config import Configuration, load_config
from cluster.config.version import with_model, without_model
from deployments import applications as serving
from deployments.applications import Applications
from deployments.handles import Handles
from deployments.runtime_models import RuntimeModels

FAKE = {"backend": "fake"}


class Ledger:
    """The ledger's configuration, with others who change it first, and models that take their time to go."""

    def __init__(self, models=None):
        self.configuration = Configuration((1.0, 0), load_config({"models": models or {"a": FAKE}}, environ={}))
        self.others = []
        self.left = 0
        self.unloaded = []
        self.loaded = []

    async def replace_config(self, expected, configuration):
        if self.others:
            self.configuration = self.others.pop(0)(self.configuration)
        elif self.configuration.version == expected:
            self.configuration = configuration
        return self.configuration

    async def newest_configuration(self):
        return self.configuration

    async def status(self):
        self.left -= 1
        if self.left == 0:
            raise errors.BackendUnavailable("being restarted")
        return SimpleNamespace(replicas=[SimpleNamespace(model="a")] if self.left > 0 else [])

    async def unload(self, model):
        self.unloaded.append(model)

    async def load(self, model, replicas):
        self.loaded.append((model, replicas))
        raise errors.ModelUnavailable("it fails")


class Serve:
    """The applications that Serve has, with the number of their replicas."""

    def __init__(self, monkeypatch):
        self.there = {GRAPH: 1}
        self.made = []
        monkeypatch.setattr(serving, "serve", self)

    def status(self):
        def app(replicas):
            return SimpleNamespace(deployments={"d": SimpleNamespace(replica_states={"RUNNING": replicas})})

        return SimpleNamespace(applications={name: app(replicas) for name, replicas in self.there.items()})

    def run(self, application, *, name, route_prefix, logging_config):
        assert route_prefix is None
        self.there[name] = 0
        self.made.append(application)

    def delete(self, name):
        del self.there[name]


@pytest.fixture
def serve(monkeypatch):
    return Serve(monkeypatch)


def runtime(ledger, source=None):
    applications = Applications(ledger, lambda pool, model: (model, pool.models[model].num_gpus))
    return RuntimeModels(ledger, applications, lambda pool: pool.with_estimates({"b": 7}), source)


async def test_a_model_is_registered_with_its_estimate_and_application(serve):
    ledger = Ledger()
    configuration = await runtime(ledger).register("b", FAKE)
    assert ledger.configuration == configuration
    assert configuration.pool.estimate_mib("b") == 7
    assert (serve.made, list(serve.there)) == ([("b", 0.0)], [GRAPH, "slotpool-model-b-0-0"])


async def test_a_change_is_made_again_where_others_were_faster(serve):
    ledger = Ledger()
    ledger.others = [lambda now: with_model(now, "c", FAKE), lambda now: without_model(now, "c")]
    configuration = await runtime(ledger).register("b", FAKE)
    assert (list(configuration.pool.models), configuration.version) == (["a", "b"], (1.0, 3))


async def test_an_id_that_another_ingress_takes_first_is_taken(serve):
    ledger = Ledger()
    ledger.others = [lambda now: with_model(now, "b", {**FAKE, "idle_timeout": 3})]
    with pytest.raises(errors.InvalidRequest) as caught:
        await runtime(ledger).register("b", FAKE)
    assert (caught.value.status, caught.value.code) == (409, "model_exists")


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda models: models.register("b", {"backend": "fake", "x": 1}), 422),
        (lambda models: models.register("b", {"model_path": "relative.gguf"}), 422),
        (lambda models: models.register("b", {"model_path": "/etc/b.gguf"}), 403),
        (lambda models: models.register("b", {"backend": "llama_cpp", "gguf_lora": "/etc/b.gguf"}), 403),
        (lambda models: models.register("b", {"gguf_lora": ["/etc/b.gguf"]}), 403),
        (lambda models: models.patch("a", {"gguf_lora": [{"path": "/etc/b.gguf"}]}), 403),
        (lambda models: models.patch("a", {"x": 1}), 422),
        (lambda models: models.patch("b", {}), 404),
        (lambda models: models.remove("b"), 404),
        (lambda models: models.reload(), 400),
    ],
)
async def test_what_is_refused_changes_nothing(serve, call, status):
    ledger = Ledger()
    before = ledger.configuration
    with pytest.raises(errors.PoolError) as caught:
        await call(runtime(ledger))
    assert caught.value.status == status
    assert ledger.configuration is before
    assert serve.made == []


async def test_a_model_that_needs_another_amount_is_unloaded_before_it_moves(serve):
    ledger = Ledger({"a": {**FAKE, "replicas": 1}})
    models = runtime(ledger)
    await models.patch("a", {"idle_timeout": 3})
    assert ledger.unloaded == []
    await models.patch("a", {"num_gpus": 0.5})
    assert ledger.unloaded == ["a"]
    assert serve.made == [("a", 0.5)]
    await asyncio.gather(*models._background)
    assert ledger.loaded == [("a", 1)]


async def test_a_removed_model_is_gone_when_the_answer_comes(serve):
    ledger = Ledger({"a": FAKE, "b": FAKE})
    models = runtime(ledger)
    await models.patch("a", {"num_gpus": 0.5})
    ledger.left = 3
    await models.remove("a")
    assert ledger.left < 0
    assert list(serve.there) == [GRAPH]


async def test_the_file_is_read_again_and_its_place_is_not_told(serve, tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text("models: {a: {backend: fake, idle_timeout: 3}, d: {backend: fake}}")
    ledger = Ledger()
    models = runtime(ledger, str(file))
    configuration = await models.reload()
    assert configuration.pool.models["a"].idle_timeout == 3
    assert serve.made == [("d", 0.0)]
    file.unlink()
    with pytest.raises(errors.InvalidRequest, match=r"^pool\.yaml: No such file") as caught:
        await models.reload()
    assert caught.value.status == 422


async def test_an_application_goes_when_it_is_empty(serve):
    ledger = Ledger()
    serve.there = {GRAPH: 1, "slotpool-model-old-0-0": 1, "another": 0}
    applications = Applications(ledger, lambda pool, model: model)
    assert not await applications.reconcile()
    serve.there["slotpool-model-old-0-0"] = 0
    assert await applications.reconcile()
    assert list(serve.there) == [GRAPH, "another"]


def test_handles_know_where_a_model_lives():
    before = Ledger().configuration
    handles = Handles(before)
    after = with_model(before, "b/c", {**FAKE, "num_gpus": 1})
    handles.follow(after)
    handles.follow(without_model(after, "b/c"))
    assert [(handle.deployment_name, handle.app_name) for handle in (handles["a"], handles["b/c"])] == [
        ("a", GRAPH),
        ("b-c", "slotpool-model-b-c-1-0"),
    ]
    assert handles["a"] is handles["a"]
    assert sorted(handles) == ["a", "b/c"]
    assert len(handles) == 2
