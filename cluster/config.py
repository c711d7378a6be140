"""The one schema of the configuration, and how files and environment variables are laid over it.

Frozen after it is read. Unknown keys are refused with their path and the nearest known key, since a mistyped key
that is silently ignored costs a user an evening. `serve_config.yaml` carries this schema under
`applications[0].args`, whole or as `config: path.yaml`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.ledger.specs import ModelSpec, PoolSpec, ServerSpec
from cluster.references import Names, check_references
from cluster.server_types import base_url, loads_just_in_time

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
FlashAttention = Literal["on", "off", "auto"]


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file, the path of the key and what is wrong."""


class FakeFaults(BaseModel):
    """`engine_kwargs` of `backend: fake`. Times in seconds; `tokens` is the default length of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_s: Annotated[float, Field(ge=0)] = 0.0
    ttft_s: Annotated[float, Field(ge=0)] = 0.0
    tokens_per_s: Annotated[float, Field(gt=0)] = 100.0
    tokens: Annotated[int, Field(ge=1)] = 16
    fault: Literal[
        "none", "load_fails", "load_hangs", "cut_mid_stream", "hang_mid_stream", "rate_limited", "malformed"
    ] = "none"


class LlamaCppKwargs(BaseModel):
    """`engine_kwargs` of `backend: llama_cpp`. `n_threads` defaults to the engine's own choice, `n_batch` likewise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_threads: Annotated[int, Field(ge=1)] | None = None
    n_batch: Annotated[int, Field(ge=32)] | None = None


class Group(BaseModel):
    """Models that are placed with an eye on each other; all members of a group say the same about `devices`.

    `separate`: no two models of the group stand on one device. `shared`: they go where another of the group already
    is, so that (say) a model and its draft or embedding model meet. `group: NAME` is short for
    `group: {name: NAME, devices: separate}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    devices: Literal["separate", "shared"] = "separate"


class ModelConfig(BaseModel):
    """One model, under its public id. Times in seconds, memory in MiB; both spellings of the replica keys are read.

    `cpu_offload_model` takes the requests that find `offload_queue_threshold` of them waiting here, `fallbacks` in
    their order those that come while this model cannot serve at all (it fails to load, or is being unloaded). Both
    name other models by id or alias.

    `weight` makes the model a variant: models that share an alias are variants of that one public name, which is
    then answered by each in proportion to its weight. An alias may be shared by models with a weight only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    backend: Literal["llama_cpp", "gguf", "fake"] = "llama_cpp"
    model_path: str | None = None
    aliases: tuple[str, ...] = ()
    prompt_format: str | None = None
    enabled: bool = False
    activation: Literal["on_demand", "manual"] = "on_demand"
    pinned: bool = False
    num_gpus: Annotated[float, Field(ge=0)] = 0
    num_cpus: Annotated[float, Field(ge=0)] = 0
    memory_mib: Annotated[int, Field(ge=1)] | None = None
    min_replicas: Annotated[int, Field(ge=0, alias="replicas")] = 0
    max_replicas: Annotated[int, Field(ge=1, alias="replica_max")] = 1
    target_inflight: Annotated[int, Field(ge=1, le=256)] = 8
    max_queued: Annotated[int, Field(ge=0)] | None = None
    idle_timeout: Annotated[float, Field(ge=0)] | None = None
    load_timeout: Annotated[float, Field(gt=0)] | None = None
    request_timeout: Annotated[float, Field(gt=0)] | None = None
    cpu_offload_model: str | None = None
    fallbacks: tuple[str, ...] = ()
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    group: Group | None = None
    gguf_n_ctx: Annotated[int, Field(ge=1)] | None = None
    gguf_flash_attn: FlashAttention = "auto"
    gguf_type_k: CacheType | None = None
    gguf_type_v: CacheType | None = None
    gguf_n_gpu_layers: int = -1
    engine_kwargs: FakeFaults | LlamaCppKwargs = Field(default=None, validate_default=True)

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _typed_engine_kwargs(cls, value: Any, info: ValidationInfo) -> Any:
        """Check `engine_kwargs` against the schema of this model's backend, so that errors name the right keys."""
        schema = FakeFaults if info.data.get("backend") == "fake" else LlamaCppKwargs
        return schema.model_validate(value or {})

    @field_validator("group", mode="before")
    @classmethod
    def _short_group(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"replicas ({self.min_replicas}) is larger than replica_max ({self.max_replicas})")
        if self.backend != "fake" and not self.model_path:
            raise ValueError(f"model_path is required for backend {self.backend}")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError("num_gpus above 1 must be a whole number of devices")
        if self.weight is not None and not self.aliases:
            raise ValueError("weight needs an alias: the public name that the variants share")
        return self

    @property
    def format(self) -> str:
        return "fake" if self.backend == "fake" else "gguf"

    @property
    def revision(self) -> str:
        """A digest of everything that a running engine was started with: if it changes, the replica is out of date."""
        engine = self.model_dump(mode="json", exclude=set(SCHEDULING_KEYS))
        return hashlib.sha256(json.dumps(engine, sort_keys=True).encode()).hexdigest()[:16]


#: Keys that tell the ledger what to do with a model and its engine nothing: a change of these drains no replica. A
#: key that is not listed here does; that is the safe side for one that is forgotten.
SCHEDULING_KEYS = (
    "aliases",
    "enabled",
    "activation",
    "pinned",
    "memory_mib",
    "min_replicas",
    "max_replicas",
    "max_queued",
    "idle_timeout",
    "load_timeout",
    "request_timeout",
    "cpu_offload_model",
    "fallbacks",
    "weight",
    "group",
)


class ServerEntry(BaseModel):
    """One external OpenAI-compatible server. `api_key_env` names the environment variable that holds its key.

    `server_type` is what it runs (`lmstudio`, `ollama`, `vllm`, `llama_server`, …); an unknown type is taken to load
    models just in time and never gets two models at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(pattern=r"^https?://[^/\s@]+(/\S*)?$")]
    max_concurrent: Annotated[int, Field(ge=1, le=4096)] = 1
    api_key_env: str | None = None
    server_type: str | None = None

    def spec(self) -> ServerSpec:
        """The server as the ledger sees it."""
        return ServerSpec(self.url, self.max_concurrent, loads_just_in_time(self.server_type), self.api_key_env)


class MaxWait(BaseModel):
    """The longest wait for a place, in seconds, that the pool strives for in each priority class.

    When it is about to pass, the door of a resident model closes, its streams end, and the waiter's model loads. Longer
    bounds mean fewer swaps. A crowd that the GPUs cannot serve in that time waits longer, whatever is chosen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    high: Annotated[float, Field(gt=0)] = 30.0
    medium: Annotated[float, Field(gt=0)] = 60.0
    low: Annotated[float, Field(gt=0)] = 120.0


class PoolConfig(BaseModel):
    """The whole pool: its models and the keys that hold for all of them.

    `execution_mode: cpu` runs every model on CPUs, whatever its `num_gpus`; by default the pool is in gpu mode if any
    model wants a GPU. `enable_cpu_offload` turns the rule of `offload_queue_threshold` on (requests beyond it go to
    the model's `cpu_offload_model`, and are refused with 429 where there is none) or off; unset, it is on when the
    configuration names a `cpu_offload_model` or a threshold. It holds in gpu mode, for models on GPUs.
    `health_check_interval` is the time between two of Serve's health checks of a replica, in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, ModelConfig] = Field(default_factory=dict)
    servers: tuple[ServerEntry, ...] = ()
    default_model: str | None = None
    capacity: Annotated[int, Field(ge=0)] = 0
    mem_budget_mb: Annotated[int, Field(ge=0)] = 0
    queue_max_size: Annotated[int, Field(ge=0)] = 100
    max_wait_s: MaxWait = MaxWait()
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    startup_timeout: Annotated[float, Field(gt=0)] = 120.0
    default_idle_timeout: Annotated[float, Field(ge=0)] = 300.0
    execution_mode: Literal["gpu", "cpu"] | None = None
    enable_cpu_offload: bool | None = None
    offload_queue_threshold: Annotated[int, Field(ge=0)] = 3
    health_check_interval: Annotated[float, Field(gt=0)] = 10.0
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0

    _estimates: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _references_lead_somewhere(self) -> PoolConfig:
        check_references(self)
        return self

    @model_validator(mode="after")
    def _servers_are_unique(self) -> PoolConfig:
        seen = set()
        for server in self.servers:
            base = base_url(server.url)
            if base in seen:
                raise ValueError(f"servers: {server.url} stands there twice")
            seen.add(base)
        return self

    def server(self, url: str) -> ServerEntry | None:
        """The external server with this URL; None when there is none."""
        return next((server for server in self.servers if server.url == url), None)

    def with_estimates(self, estimates: Mapping[str, int]) -> PoolConfig:
        """A copy that knows what its models will take: MiB by id, used where `memory_mib` is not configured."""
        copy = self.model_copy()
        copy._estimates = dict(estimates)
        return copy

    def estimate_mib(self, model_id: str) -> int | None:
        """What a model's files say it will take; None where nothing is known of them."""
        return self._estimates.get(model_id)

    @cached_property
    def names(self) -> Names:
        """Every name that a client may use: ids, aliases, and the public names of variants."""
        return Names.of(self.models)

    @property
    def mode(self) -> str:
        """`gpu` or `cpu`, as configured or as the models have it."""
        return self.execution_mode or ("gpu" if any(model.num_gpus for model in self.models.values()) else "cpu")

    def resolve(self, name: str) -> str | None:
        """What the ledger calls the model that a client calls `name`; None when there is none.

        An id or an alias gives the id; a public name of several variants is handed on, for the ledger takes turns.
        With external servers any other name may be a model of theirs: only the ledger knows.
        """
        return self.names.targets.get(name, name if self.servers else None)

    def request_timeout_s(self, name: str) -> float:
        """The longest that one request of a model (or of a public name) may take, queue and load included, in s."""
        members = [model for model, _ in self.names.variants.get(name, ((name, 1.0),))]
        models = [self.models.get(member) for member in members]
        return max((model and model.request_timeout) or self.request_timeout_seconds for model in models)

    def longest_request_s(self) -> float:
        """The bound on every request's life; Serve's own grace period must lie above it."""
        return max([self.request_timeout_seconds, *(self.request_timeout_s(m) for m in self.models)])

    def spec(self) -> PoolSpec:
        """The pool as the ledger sees it, without its machines."""
        return PoolSpec(
            models={name: self._model_spec(name, model) for name, model in self.models.items()},
            capacity=self.capacity,
            queue_max_size=self.queue_max_size,
            bound_s=(self.max_wait_s.high, self.max_wait_s.medium, self.max_wait_s.low),
            offload_queue_threshold=self._offload_threshold(),
            variants=self.names.variants,
            drain_timeout_s=self.longest_request_s(),
            node_memory_mib=self.mem_budget_mb,
            servers=tuple(server.spec() for server in self.servers),
        )

    def _offload_threshold(self) -> int:
        enabled = self.enable_cpu_offload
        if enabled is None:
            named = any(model.cpu_offload_model for model in self.models.values())
            enabled = named or "offload_queue_threshold" in self.model_fields_set
        return self.offload_queue_threshold if enabled and self.mode == "gpu" else 0

    def _model_spec(self, name: str, model: ModelConfig) -> ModelSpec:
        return ModelSpec(
            name=name,
            slots=model.target_inflight,
            num_gpus=model.num_gpus,
            num_cpus=model.num_cpus,
            memory_mib=model.memory_mib or self._estimates.get(name, 0),
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            max_queued=model.max_queued,
            idle_timeout_s=self.default_idle_timeout if model.idle_timeout is None else model.idle_timeout,
            load_timeout_s=model.load_timeout or self.startup_timeout,
            pinned=model.pinned,
            preload=model.enabled,
            manual=model.activation == "manual",
            cpu_offload_model=self.resolve(model.cpu_offload_model) if model.cpu_offload_model else None,
            fallbacks=tuple(self.names.targets[name] for name in model.fallbacks),
            group=model.group.name if model.group else None,
            group_share=model.group is not None and model.group.devices == "shared",
            revision=model.revision,
        )


#: Environment variables that override a pool-wide key, and the key.
ENVIRONMENT = {
    "INFERENCE_QUEUE_MAX_SIZE": "queue_max_size",
    "INFERENCE_REQUEST_TIMEOUT_SECONDS": "request_timeout_seconds",
    "DEFAULT_IDLE_TIMEOUT": "default_idle_timeout",
    "STARTUP_TIMEOUT": "startup_timeout",
    "EXECUTION_MODE": "execution_mode",
    "ENABLE_CPU_OFFLOAD": "enable_cpu_offload",
    "OFFLOAD_QUEUE_THRESHOLD": "offload_queue_threshold",
    "HEALTH_CHECK_INTERVAL": "health_check_interval",
}


def load_config(args: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ) -> PoolConfig:
    """Read the configuration from an application's `args`: the keys themselves, or `config: path` alone.

    Values of the environment variables in `ENVIRONMENT` win. Raises `ConfigError` with one line per mistake.
    """
    data = dict(args or {})
    source = "serve_config.yaml: args"
    if "config" in data:
        path = Path(str(data.pop("config"))).expanduser()
        if data:
            raise ConfigError(f"args: 'config' stands alone, but {sorted(data)} stand beside it")
        data, source = read_yaml(path), str(path)
    for variable, key in ENVIRONMENT.items():
        if variable in environ:
            data[key] = environ[variable]
    try:
        config = PoolConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, item) for item in error.errors())) from None
    return _without_gpus(config) if config.execution_mode == "cpu" else config


def _without_gpus(config: PoolConfig) -> PoolConfig:
    models = {name: model.model_copy(update={"num_gpus": 0.0}) for name, model in config.models.items()}
    return config.model_copy(update={"models": models})


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping. Raises `ConfigError` when it is missing, broken or something else."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top")
    return data


def _explain(source: str, item: Any) -> str:
    """One line for one mistake; an unknown key is told the nearest known one."""
    location = [str(part) for part in item["loc"]]
    path = ".".join(location)
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{source}: {path}: {message}" if path else f"{source}: {message}"
    near = difflib.get_close_matches(location[-1], _known_keys(location), n=1)
    return f"{source}: {path}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def _known_keys(location: list[str]) -> list[str]:
    if "engine_kwargs" in location:
        return [*FakeFaults.model_fields, *LlamaCppKwargs.model_fields]
    if location[0] == "servers" and len(location) > 2:
        return [*ServerEntry.model_fields]
    if "group" in location[2:-1]:
        return [*Group.model_fields]
    fields = ModelConfig.model_fields if location[0] == "models" and len(location) > 2 else PoolConfig.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias)]
