"""The configuration: defaults, both spellings, and errors that name the key."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from app.cli.checks import refuse_strangers_without_keys
from app.cli.document import declared_gpus, lay_over
from cluster.config import ConfigError, FakeFaults, FakeModel, LlamaCppModel, ModelConfig, PoolConfig, load_config
from cluster.config.schema import POOL, schemas
from cluster.config.store import KvStoreConfig
from cluster.ledger.specs import ServerSpec

FAKE = {"backend": "fake"}


def test_the_shipped_file_is_valid():
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    config = load_config(document["applications"][0]["args"], environ={})
    assert config.models["smollm2"].enabled
    assert config.resolve("default") == "smollm2"
    assert document["http_options"]["host"] == "127.0.0.1"
    assert "autoscaling_policy" not in document["applications"][0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modles": {}}, "modles: unknown key, did you mean 'models'?"),
        (
            {"models": {"a": {**FAKE, "idle_timeot": 1}}},
            "models.a.idle_timeot: unknown key, did you mean 'idle_timeout'?",
        ),
        ({"models": {"a": {**FAKE, "engine_kwargs": {"lod_s": 1}}}}, "did you mean 'load_s'?"),
        ({"models": {"a": {**FAKE, "replicas": 3}}}, r"replicas \(3\) is larger than replica_max \(1\)"),
        ({"models": {"a": {}}}, "models.a: .*model_path is required for backend llama_cpp"),
        (
            {"models": {"a": {**FAKE, "gguf_n_ctx": 512}}},
            "models.a.gguf_n_ctx: only models of backend gguf or llama_cpp have this key",
        ),
        ({"models": {"a": {"model_path": "m", "gguf_n_ctxx": 512}}}, "did you mean 'gguf_n_ctx'?"),
        ({"models": {"a": {"model_path": "m", "engine_kwargs": {"load_s": 1}}}}, "engine_kwargs.load_s: unknown key$"),
        ({"models": {"a": {"backend": "lama_cpp"}}}, "models.a.backend: no such backend, did you mean 'llama_cpp'?"),
        ({"models": {"a": {"backend": 5}}}, "models.a.backend: no such backend, there are .*fake, gguf, llama_cpp"),
        ({"models": {"a": {**FAKE, "gpu": -1, "num_gpus": 1}}}, "models.a.gpu: '?-1'? is no device"),
        ({"models": {"a": {**FAKE, "gpu": True, "num_gpus": 1}}}, "models.a.gpu: True is no device"),
        ({"models": {"a": {**FAKE, "gpu": "cuda:0", "num_gpus": 1}}}, "models.a.gpu: 'cuda:0' is no device"),
        ({"models": {"a": {**FAKE, "gpu": [0, "0"], "num_gpus": 1}}}, "models.a.gpu: a device stands there twice"),
        ({"models": {"a": {**FAKE, "gpu": 1}}}, "models.a: gpu names devices, but num_gpus is 0"),
        ({"models": {"a": {**FAKE, "python": ""}}}, "models.a.python: "),
        ({"models": {"a": {**FAKE, "num_gpus": 1.5}}}, "whole number of devices"),
        ({"models": {"a": {**FAKE, "aliases": ["b"]}, "b": FAKE}}, "models.a.aliases: 'b' is already a model id"),
        ({"kv_store_dir": "kept"}, "args: kv_store_dir: .*must be an absolute path"),
        (
            {"models": {"a": {"model_path": "m", "num_gpus": 2, "gguf_tensor_split": [1]}}},
            r"gguf_tensor_split needs a share for each of num_gpus \(2\) devices",
        ),
        ({"models": {"a": {"model_path": "m", "num_gpus": 2, "gguf_tensor_split": [0, 0]}}}, "needs a share for each"),
        ({"models": {"a": {"model_path": "m", "gguf_lora": {"pth": "x"}}}}, "gguf_lora.0.pth: unknown key"),
        ({"default_model": "x"}, "args: default_model: 'x' is not a configured model"),
        (
            {"models": {"a": {**FAKE, "aliases": ["x"], "weight": 1}, "b": {**FAKE, "aliases": ["x"]}}},
            "models.b.aliases: 'x' is already an alias of 'a'; .* each need a weight",
        ),
        ({"models": {"a": {**FAKE, "weight": 1}}}, "models.a: weight needs an alias"),
        ({"models": {"a": {**FAKE, "weight": 0, "aliases": ["x"]}}}, "models.a.weight: "),
        (
            {"models": {"big": {**FAKE, "fallbacks": ["smal"]}, "small": FAKE}},
            "args: models.big.fallbacks: 'smal' is not a configured model, did you mean 'small'?",
        ),
        ({"models": {"a": {**FAKE, "fallbacks": ["a"]}}}, "models.a.fallbacks: 'a' is the model itself"),
        (
            {"models": {"big": {**FAKE, "cpu_offload_model": "smal"}, "small": FAKE}},
            "models.big.cpu_offload_model: 'smal' is not a configured model, did you mean 'small'?",
        ),
        (
            {"models": {"a": {**FAKE, "cpu_offload_model": "b"}, "b": {**FAKE, "num_gpus": 1}}},
            "models.a.cpu_offload_model: 'b' runs on a GPU itself",
        ),
        ({"models": {"a": {**FAKE, "group": {"nme": "g"}}}}, "models.a.group.nme: unknown key, did you mean 'name'?"),
        (
            {"models": {"a": {**FAKE, "group": "g"}, "b": {**FAKE, "group": {"name": "g", "devices": "shared"}}}},
            "models.b.group: 'g' is 'separate' in models.a and 'shared' here",
        ),
        ({"offload_queue_treshold": 2}, "did you mean 'offload_queue_threshold'?"),
        ({"execution_mode": "tpu"}, "execution_mode: "),
        ({"queue_max_size": -1}, "queue_max_size"),
        ({"max_wait_s": {"low": 0}}, "max_wait_s.low"),
        ({"servers": [{"url": "http://h:1", "max_concurent": 1}]}, "did you mean 'max_concurrent'?"),
        ({"servers": [{"url": "h:1"}]}, r"servers\.0\.url"),
        ({"servers": [{"url": "http://user:secret@h:1"}]}, r"servers\.0\.url"),
        ({"servers": [{"url": "http://h:1", "max_concurrent": 0}]}, r"servers\.0\.max_concurrent"),
        ({"servers": [{"url": "http://h:1"}, {"url": "http://h:1/v1"}]}, "http://h:1/v1 stands there twice"),
        ({"config": "pool.yaml", "models": {}}, "'config' stands alone"),
        ({"config": "/nowhere/pool.yaml"}, "No such file"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(ConfigError, match=message):
        load_config(args, environ={})


def test_a_file_of_its_own_and_the_environment(tmp_path):
    file = tmp_path / "pool.yaml"
    file.write_text(yaml.safe_dump({"models": {"a": FAKE}, "queue_max_size": 5}))
    config = load_config({"config": str(file)}, environ={"INFERENCE_QUEUE_MAX_SIZE": "7", "DEFAULT_IDLE_TIMEOUT": "9"})
    assert config.queue_max_size == 7
    assert config.spec().models["a"].idle_timeout_s == 9


def test_both_spellings_of_the_replica_keys():
    config = load_config(
        {
            "models": {
                "a": {**FAKE, "replicas": 1, "replica_max": 2},
                "b": {**FAKE, "min_replicas": 1, "max_replicas": 2},
            }
        },
        environ={},
    )
    assert config.models["a"] == config.models["b"]
    assert isinstance(config.models["a"].engine_kwargs, FakeFaults)


def test_idle_timeout_zero_means_never_and_is_not_the_default():
    config = load_config({"models": {"a": {**FAKE, "idle_timeout": 0}, "b": FAKE}}, environ={})
    spec = config.spec()
    assert spec.models["a"].idle_timeout_s == 0
    assert spec.models["b"].idle_timeout_s == 300


def test_the_policys_keys_reach_the_ledger():
    config = load_config(
        {
            "models": {
                "big": {**FAKE, "num_gpus": 1, "cpu_offload_model": "little", "fallbacks": ["spare"], "group": "g"},
                "small": {**FAKE, "aliases": ["little"], "group": {"name": "rag", "devices": "shared"}},
                "spare": FAKE,
            }
        },
        environ={},
    )
    spec = config.spec()
    assert spec.models["big"].cpu_offload_model == "small"
    assert spec.models["big"].fallbacks == ("spare",)
    assert (spec.models["big"].group, spec.models["big"].group_share) == ("g", False)
    assert (spec.models["small"].group, spec.models["small"].group_share) == ("rag", True)
    assert spec.offload_queue_threshold == 3


def test_variants_share_an_alias_and_the_ledger_gets_the_public_name():
    config = load_config(
        {
            "models": {
                "old": {**FAKE, "aliases": ["chat", "stable"], "weight": 3, "request_timeout": 5},
                "new": {**FAKE, "aliases": ["chat"], "weight": 1, "request_timeout": 9},
            },
            "default_model": "chat",
        },
        environ={},
    )
    assert config.spec().variants == {"chat": (("old", 3.0), ("new", 1.0))}
    assert [config.resolve(name) for name in ("chat", "stable", "new", "nope")] == ["chat", "old", "new", None]
    assert config.request_timeout_s("chat") == 9
    assert config.request_timeout_s("old") == 5


@pytest.mark.parametrize(
    ("keys", "threshold"),
    [
        ({}, 0),
        ({"offload_queue_threshold": 2}, 2),
        ({"enable_cpu_offload": True}, 3),
        ({"enable_cpu_offload": False, "offload_queue_threshold": 2}, 0),
        ({"enable_cpu_offload": True, "execution_mode": "cpu"}, 0),
    ],
)
def test_when_cpu_offload_is_on(keys, threshold):
    config = load_config({"models": {"a": {**FAKE, "num_gpus": 1}}, **keys}, environ={})
    assert config.spec().offload_queue_threshold == threshold


def test_cpu_mode_takes_no_gpus():
    config = load_config({"models": {"a": {**FAKE, "num_gpus": 1}}}, environ={"EXECUTION_MODE": "cpu"})
    assert config.mode == "cpu"
    assert config.spec().models["a"].num_gpus == 0
    assert load_config({"models": {"a": {**FAKE, "num_gpus": 1}}}, environ={}).mode == "gpu"
    assert load_config({"models": {"a": FAKE}}, environ={}).mode == "cpu"


def test_the_policys_environment():
    environ = {"ENABLE_CPU_OFFLOAD": "true", "OFFLOAD_QUEUE_THRESHOLD": "5", "HEALTH_CHECK_INTERVAL": "4"}
    config = load_config({"models": {"a": {**FAKE, "num_gpus": 1}}}, environ)
    assert (config.spec().offload_queue_threshold, config.health_check_interval) == (5, 4)


@pytest.mark.parametrize(
    ("changed", "drains"),
    [
        ({"idle_timeout": 7, "aliases": ["x"], "max_queued": 1, "pinned": True, "memory_mib": 5}, False),
        ({"max_replicas": 4, "load_timeout": 9, "enabled": True, "fallbacks": ["b"], "group": "g"}, False),
        ({"prompt_format": "chatml"}, True),
        ({"engine_kwargs": {"tokens": 3}}, True),
        ({"num_gpus": 1}, True),
        ({"python": "/opt/other/bin/python"}, True),
    ],
)
def test_only_what_the_engine_sees_changes_its_revision(changed, drains):
    def revision(fields):
        config = load_config({"models": {"a": {**FAKE, **fields}, "b": FAKE}}, environ={})
        return config.spec().models["a"].revision

    assert (revision({}) != revision(changed)) is drains


def test_the_backend_picks_the_class_of_a_model():
    config = load_config(
        {"models": {"f": FAKE, "g": {"backend": "gguf", "model_path": "m", "gguf_n_ctx": 9}, "d": {"model_path": "m"}}},
        environ={},
    )
    assert {name: type(model) for name, model in config.models.items()} == {
        "f": FakeModel,
        "g": LlamaCppModel,
        "d": LlamaCppModel,
    }
    for model in config.models.values():
        plain = json.loads(json.dumps(model.model_dump(mode="json", by_alias=False)))
        assert ModelConfig.model_validate(plain) == model
        assert ModelConfig.model_validate(plain).revision == model.revision
    assert PoolConfig.model_validate(config.model_dump()) == config
    assert (config.models["g"].context_length, config.models["f"].context_length) == (9, None)


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        (None, ()),
        (0, ("0",)),
        ("1", ("1",)),
        ([0, 2], ("0", "2")),
        ("node-1/3", ("node-1/3",)),
        ("GPU-5a1b-77", ("GPU-5a1b-77",)),
        (["10.0.0.1/GPU-5a1b", "10.0.0.2/0"], ("10.0.0.1/GPU-5a1b", "10.0.0.2/0")),
    ],
)
def test_the_devices_of_a_model_reach_the_ledger(given, devices):
    args = {"models": {"a": {**FAKE, "num_gpus": 1, "gpu": given}, "b": {**FAKE, "num_gpus": 1}}}
    config = load_config(args, environ={})
    assert config.spec().models["a"].devices == devices
    assert (config.models["a"].revision != config.models["b"].revision) is bool(devices)
    assert load_config(args, environ={"EXECUTION_MODE": "cpu"}).spec().models["a"].devices == ()


def test_the_grace_period_covers_the_longest_request():
    config = load_config({"models": {"a": {**FAKE, "request_timeout": 5000}}}, environ={})
    assert config.longest_request_s() == 5000


def test_the_command_line_lies_over_the_file(tmp_path, monkeypatch):
    document = {"applications": [{"name": "slotpool", "args": {"models": {}}}], "http_options": {"port": 1}}
    (tmp_path / "p.yaml").write_text("models: {}")
    merged = lay_over(document, tmp_path / "p.yaml", 9000)
    assert merged["http_options"] == {"host": "127.0.0.1", "port": 9000}
    assert merged["applications"][0]["args"] == {"config": str(tmp_path / "p.yaml")}
    monkeypatch.setenv("ROUTER_PORT", "9001")
    assert lay_over(document, None, None)["http_options"]["port"] == 9001
    with pytest.raises(ConfigError, match="exactly one application"):
        lay_over({"applications": []}, None, None)


def test_a_pool_without_keys_is_not_opened_to_other_machines():
    key = {"api_keys": [f"sha256:{'0' * 64}"]}
    for host, args in (("127.0.0.1", {}), ("localhost", {}), ("::1", {}), ("0.0.0.0", key)):
        refuse_strangers_without_keys(host, load_config(args, environ={}))
    for host in ("0.0.0.0", "::", "192.168.0.5", "gpu-box", ""):
        with pytest.raises(ConfigError, match="configure api_keys"):
            refuse_strangers_without_keys(host, load_config({}, environ={}))


def test_external_servers_become_slots():
    entries = [
        {"url": "http://one:1234", "max_concurrent": 2, "server_type": "lmstudio"},
        {"url": "http://two:8000/v1", "server_type": "vLLM", "api_key_env": "KEY"},
        {"url": "http://three:1"},
    ]
    config = load_config({"models": {"a": FAKE}, "servers": entries, "default_model": "theirs"}, environ={})
    assert config.spec().servers == (
        ServerSpec("http://one:1234", 2),
        ServerSpec("http://two:8000/v1", 1, False, "KEY"),
        ServerSpec("http://three:1"),
    )
    assert config.resolve("theirs") == "theirs"
    assert config.request_timeout_s("theirs") == 600
    assert config.server("http://three:1") == config.servers[2]
    assert config.server("a-replica") is None
    assert load_config({"models": {"a": FAKE}}, environ={}).resolve("theirs") is None


def test_the_environment_declares_gpus(monkeypatch):
    monkeypatch.delenv("INFERENCE_GPU_COUNT", raising=False)
    assert declared_gpus() is None
    monkeypatch.setenv("INFERENCE_GPU_COUNT", "2")
    assert declared_gpus() == 2
    monkeypatch.setenv("INFERENCE_GPU_COUNT", "two")
    with pytest.raises(ConfigError, match="INFERENCE_GPU_COUNT: 'two'"):
        declared_gpus()


def test_the_readmes_examples_are_valid():
    """Those that it had moved to `docs/`; `test_docs.py` looks at every page."""
    pages = ("README.md", "docs/models.md", "docs/keys.md")
    blocks = [part.split("```")[0] for page in pages for part in Path(page).read_text().split("```yaml\n")[1:]]
    for block in blocks:
        config = load_config(yaml.safe_load(block), environ={"SLOTPOOL_KEY": "k"})
        assert config.spec().models or config.servers or config.api_keys
        jsonschema.validate(yaml.safe_load(block), schemas()[POOL])
    assert len(blocks) == 5


def test_conversations_are_saved_where_an_engine_can():
    remembers = {"models": {"a": FAKE, "b": {"model_path": "/m"}}}
    assert load_config(remembers, environ={}).kv_store == KvStoreConfig(None, None)
    kept = {"kv_store_mib": 100, "kv_store_dir": "~/kept"}
    assert load_config({**remembers, **kept}, environ={}).kv_store == KvStoreConfig(100, "~/kept")
    assert load_config({**remembers, "kv_store_mib": 0}, environ={}).kv_store is None
    assert load_config({"models": {"a": FAKE}, **kept}, environ={}).kv_store is None


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, []),
        ("/l.gguf", [("/l.gguf", 1.0)]),
        ({"path": "/l.gguf", "scale": 0.5}, [("/l.gguf", 0.5)]),
        (["/l.gguf", {"path": "hf:o/r/m.gguf", "scale": -1}], [("/l.gguf", 1.0), ("hf:o/r/m.gguf", -1.0)]),
    ],
)
def test_adapters_are_paths_with_a_scale(written, expected):
    model = LlamaCppModel(model_path="/m", gguf_lora=written)
    assert [(each.path, each.scale) for each in model.gguf_lora] == expected
    assert model.files == ("/m", *(path for path, _ in expected))
    assert LlamaCppModel.model_validate(model.model_dump(mode="json", by_alias=False)) == model
    assert (model.revision == LlamaCppModel(model_path="/m").revision) == (not expected)
