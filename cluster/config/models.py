"""One model, one external server: the part of the configuration that stands under `models:` and `servers:`."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cluster.ledger.specs import ServerSpec
from cluster.servers.types import loads_just_in_time

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
FlashAttention = Literal["on", "off", "auto"]


class FakeFaults(BaseModel):
    """`engine_kwargs` of `backend: fake`. Times in seconds; `tokens` is the default length of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_s: Annotated[float, Field(ge=0)] = 0.0
    ttft_s: Annotated[float, Field(ge=0)] = 0.0
    tokens_per_s: Annotated[float, Field(gt=0)] = 100.0
    tokens: Annotated[int, Field(ge=1)] = 16
    fault: Literal[
        "none",
        "load_fails",
        "load_hangs",
        "cut_mid_stream",
        "hang_mid_stream",
        "rate_limited",
        "malformed",
        "dies_after",
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
