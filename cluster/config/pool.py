"""The whole pool's configuration: its models and servers, the keys that hold for all, and what the ledger gets of it.

Frozen after it is read. `serve_config.yaml` carries this schema under `applications[0].args`, whole or as
`config: path.yaml`; `load.py` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from cluster.config.keys import ApiKey, check_keys
from cluster.config.models import ModelConfig, ServerEntry
from cluster.config.names import Names, check_references
from cluster.config.store import KvStoreConfig, StoreConfig
from cluster.ledger.specs import ModelSpec, PoolSpec
from cluster.servers.types import base_url

#: What clients of the allocator expect a request to take at most, in seconds.
ALLOCATOR_TIMEOUT_S = 30.0


class MaxWait(BaseModel):
    """The longest wait for a place, in seconds, that the pool strives for in each priority class.

    When it is about to pass, a resident model drains, its streams end, and the waiter's model loads. Longer
    bounds mean fewer swaps. A crowd that the GPUs cannot serve in that time waits longer, whatever is chosen.
    A class without one has a bound that fits the hardware: 3, 8 or 20 times what a swap to the model takes, as
    learned, and never under 5, 15 or 40 s.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    high: Annotated[float, Field(gt=0)] | None = None
    medium: Annotated[float, Field(gt=0)] | None = None
    low: Annotated[float, Field(gt=0)] | None = None


class Decoding(BaseModel):
    """What the pool dialect of Responses generates with where a request says nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beam_size: Annotated[int, Field(ge=1, le=16)] = 1
    top_k: Annotated[int, Field(ge=1, le=200)] = 1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.1
    repetition_penalty: Annotated[float, Field(ge=0, le=4)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 256
    stop: tuple[str, ...] = ()


class PoolConfig(BaseModel):
    """The whole pool: its models and the keys that hold for all of them.

    `execution_mode: cpu` runs every model on CPUs, whatever its `num_gpus`; by default the pool is in gpu mode if any
    model wants a GPU. `enable_cpu_offload` turns the rule of `offload_queue_threshold` on (requests beyond it go to
    the model's `cpu_offload_model`, and are refused with 429 where there is none) or off; unset, it is on when the
    configuration names a `cpu_offload_model` or a threshold. It holds in gpu mode, for models on GPUs.
    `health_check_interval` is the time between two of Serve's health checks of a replica, in seconds.
    `max_asleep` is how many replicas may be kept whose engine is not loaded: a swap then starts an engine, and no
    replica. `auto` is what fits in a quarter of a node's memory; with 0, the default on a Ray that was there before,
    a replica ends with its engine. `asleep_device_mib` is what an engine that sleeps (level 1) may hold on a device;
    one that holds more ends instead.
    `kv_store_mib` is how much of each node's memory holds the conversations that engines save when they are unloaded,
    so that they go on after the next load; unset, a quarter of what is free then, and 0 = none are saved.
    `kv_store_dir` is a folder on each node's disk to which they are copied, so that they survive a restart of the pool.
    `max_keep_alive` (s) bounds the `keep_alive` of requests without an admin key. `model_roots` says where the files of
    models that are registered at run time may lie: folders, `package:NAME`, `hf:OWNER` or `hf:OWNER/REPO`.
    `sglang_max_running_requests` and `sglang_max_total_tokens` (0 = what fits) bound every server of `backend: sglang`.
    `store` says where stored responses are kept, and `decoding` what the pool dialect generates with by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, SerializeAsAny[ModelConfig]] = Field(default_factory=dict)
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
    api_keys: tuple[ApiKey, ...] = ()
    admin_keys: tuple[ApiKey, ...] = ()
    max_asleep: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    asleep_device_mib: Annotated[int, Field(ge=0)] = 600
    kv_store_mib: Annotated[int, Field(ge=0)] | None = None
    kv_store_dir: str | None = None
    max_keep_alive: Annotated[float, Field(gt=0)] = 3600.0
    model_roots: tuple[str, ...] = ()
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    sglang_max_running_requests: Annotated[int, Field(ge=1)] = 3
    sglang_max_total_tokens: Annotated[int, Field(ge=0)] = 0
    store: StoreConfig = StoreConfig()
    decoding: Decoding = Decoding()

    _estimates: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _references_lead_somewhere(self) -> PoolConfig:
        on_cpu = self.execution_mode == "cpu"
        check_references(self.models, self.names, self.default_model, on_cpu=on_cpu, has_servers=bool(self.servers))
        return self

    @model_validator(mode="after")
    def _keys_are_unique(self) -> PoolConfig:
        check_keys(self.api_keys, self.admin_keys)
        return self

    @field_validator("model_roots")
    @classmethod
    def _roots_are_absolute(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        for root in roots:
            if not re.match(r"/|~|package:[A-Za-z0-9_]+|hf:[^/]+", root):
                raise ValueError(f"{root!r} is neither an absolute folder nor package:NAME nor hf:OWNER[/REPO]")
        return roots

    @field_validator("kv_store_dir")
    @classmethod
    def _store_is_absolute(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.startswith(("/", "~")):
            raise ValueError("must be an absolute path: the processes that use it have other working directories")
        return folder

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
    def runtime_roots(self) -> tuple[str, ...]:
        """Where the file of a model that is registered at run time may lie: `model_roots`, and the files in use."""
        in_use = (path for model in self.models.values() for path in model.files)
        return (*self.model_roots, *in_use)

    @property
    def kv_store(self) -> KvStoreConfig | None:
        """Where conversations are saved; None where they are not, or no model's engine can."""
        if self.kv_store_mib == 0 or not any(model.remembers for model in self.models.values()):
            return None
        return KvStoreConfig(self.kv_store_mib, self.kv_store_dir)

    @property
    def mode(self) -> str:
        """`gpu` or `cpu`, as configured or as the models have it."""
        return self.execution_mode or ("gpu" if any(model.num_gpus for model in self.models.values()) else "cpu")

    def model_in_pool(self, model: ModelConfig) -> ModelConfig:
        """A model as its engine is started here: within the pool's own bounds."""
        return model.bounded(self.sglang_max_running_requests, self.sglang_max_total_tokens)

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

    @property
    def allocator_timeout_s(self) -> float:
        """The longest that a request of the allocator's family may take, whose clients expect half a minute, in s."""
        is_set = "request_timeout_seconds" in self.model_fields_set
        return self.request_timeout_seconds if is_set else ALLOCATOR_TIMEOUT_S

    def longest_request_s(self) -> float:
        """The bound on every request's life; Serve's own grace period must lie above it."""
        return max([self.request_timeout_seconds, *(self.request_timeout_s(m) for m in self.models)])

    def spec(self) -> PoolSpec:
        """The pool as the ledger sees it, without its machines."""
        return PoolSpec(
            models={name: self._model_spec(name, self.model_in_pool(model)) for name, model in self.models.items()},
            capacity=self.capacity,
            queue_max_size=self.queue_max_size,
            bound_s=(self.max_wait_s.high, self.max_wait_s.medium, self.max_wait_s.low),
            offload_queue_threshold=self._offload_threshold(),
            variants=self.names.variants,
            drain_timeout_s=self.longest_request_s(),
            max_keep_alive_s=self.max_keep_alive,
            node_memory_mib=self.mem_budget_mb,
            max_asleep=None if self.max_asleep == "auto" else self.max_asleep,
            asleep_device_mib=self.asleep_device_mib,
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
            slots=model.slots,
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
            devices=model.gpu if model.num_gpus else (),
            sleep_timeout_s=model.sleep_timeout,
            # Without devices there is nothing to give back.
            sleep_level={"auto": 0, 1: 1, 2: 2}[model.sleep_level] if model.sleeps and model.num_gpus else 2,
        )
