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

    #: The bound of class `high`, in seconds. Unset: 3 times what a swap takes, at least 5.
    high: Annotated[float, Field(gt=0)] | None = None
    #: The bound of class `medium`. Unset: 8 times what a swap takes, at least 15.
    medium: Annotated[float, Field(gt=0)] | None = None
    #: The bound of class `low`. Unset: 20 times what a swap takes, at least 40.
    low: Annotated[float, Field(gt=0)] | None = None


class Decoding(BaseModel):
    """What the pool dialect of Responses generates with where a request says nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Beams of the search; only CTranslate2 has it.
    beam_size: Annotated[int, Field(ge=1, le=16)] = 1
    #: How many of the likeliest tokens are drawn from.
    top_k: Annotated[int, Field(ge=1, le=200)] = 1
    #: The share of probability that is drawn from.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    #: 0 takes the likeliest token always.
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.1
    #: Above 1 a token that was said before becomes less likely.
    repetition_penalty: Annotated[float, Field(ge=0, le=4)] = 1.0
    #: The longest answer, in tokens.
    max_tokens: Annotated[int, Field(ge=1)] = 256
    #: Texts that end the answer.
    stop: tuple[str, ...] = ()


class PoolConfig(BaseModel):
    """The whole pool: its models and the keys that hold for all of them. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The pool's own models, by the id that clients use.
    models: dict[str, SerializeAsAny[ModelConfig]] = Field(default_factory=dict)
    #: External OpenAI-compatible servers, whose slots the pool hands out like its own.
    servers: tuple[ServerEntry, ...] = ()
    #: What a request gets that names no model, and one of the allocator's family whose model is not there.
    default_model: str | None = None
    #: How many models may be loaded at the same time; 0 = as many as fit.
    capacity: Annotated[int, Field(ge=0)] = 0
    #: The memory of each machine that models may take, in MiB; 0 = what is there.
    mem_budget_mb: Annotated[int, Field(ge=0)] = 0
    #: Requests that may wait, all models together. Who comes then is refused.
    queue_max_size: Annotated[int, Field(ge=0)] = 100
    #: The longest wait for a place that the pool strives for, by priority class.
    max_wait_s: MaxWait = MaxWait()
    #: The longest that a request may take, queue and load included. The allocator's family has 30 where this is unset.
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    #: The longest that a load may take; a model's `load_timeout` wins.
    startup_timeout: Annotated[float, Field(gt=0)] = 120.0
    #: How long a model stays without a request; 0 = until its room is needed. A model's `idle_timeout` wins.
    default_idle_timeout: Annotated[float, Field(ge=0)] = 300.0
    #: `cpu` runs every model on CPUs, whatever its `num_gpus`. Unset: `gpu` if any model wants a GPU.
    execution_mode: Literal["gpu", "cpu"] | None = None
    #: Turns the rule of `offload_queue_threshold` on or off. Unset: on where a `cpu_offload_model` or a threshold is.
    enable_cpu_offload: bool | None = None
    #: Requests beyond so many that wait for a model on a GPU go to its `cpu_offload_model`; without one: 429.
    offload_queue_threshold: Annotated[int, Field(ge=0)] = 3
    #: The time between two of Serve's health checks of a replica.
    health_check_interval: Annotated[float, Field(gt=0)] = 10.0
    #: Who may ask. Without any key the pool serves its own machine only.
    api_keys: tuple[ApiKey, ...] = ()
    #: Keys for `/v1/admin` and `/admin`, and good for everything else.
    admin_keys: tuple[ApiKey, ...] = ()
    #: Replicas that are kept while their engine is not loaded. `auto`: what fits in a quarter of a machine's memory,
    #: the default in a Ray that `slotpool serve` started. With 0 a replica ends with its engine.
    max_asleep: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    #: What an engine that sleeps (level 1) may hold on a device, in MiB; one that holds more ends instead.
    asleep_device_mib: Annotated[int, Field(ge=0)] = 600
    #: Each machine's memory for conversations that engines save when they are unloaded, in MiB. Unset: a quarter of
    #: what is free then; 0 = nothing is saved.
    kv_store_mib: Annotated[int, Field(ge=0)] | None = None
    #: A folder on each machine's disk to which they are copied, so that they survive a restart of the pool.
    kv_store_dir: str | None = None
    #: The longest `keep_alive` of a request without an admin key.
    max_keep_alive: Annotated[float, Field(gt=0)] = 3600.0
    #: Where the files of models that are registered at run time may lie: folders, `package:NAME`, `hf:OWNER` or
    #: `hf:OWNER/REPO`.
    model_roots: tuple[str, ...] = ()
    #: The largest body of a request, in MiB.
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    #: The most requests that a server of `backend: sglang` runs at a time.
    sglang_max_running_requests: Annotated[int, Field(ge=1)] = 3
    #: The most tokens that a server of `backend: sglang` holds; 0 = what fits.
    sglang_max_total_tokens: Annotated[int, Field(ge=0)] = 0
    #: Where stored responses and budgets are kept.
    store: StoreConfig = StoreConfig()
    #: What the pool dialect of Responses generates with by default.
    decoding: Decoding = Decoding()
    #: A file on each machine, or `stderr`, that gets one line of JSON for each request that has ended. Unset: none.
    request_log: str | None = None

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

    @field_validator("request_log")
    @classmethod
    def _log_is_absolute(cls, target: str | None) -> str | None:
        if target is not None and target != "stderr" and not target.startswith(("/", "~")):
            raise ValueError("must be stderr, or the absolute path of a file")
        return target

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
