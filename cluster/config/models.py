"""One model, one external server: the part of the configuration that stands under `models:` and `servers:`."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from cluster.ledger.specs import ServerSpec
from cluster.servers.types import loads_just_in_time

#: The backend of a model that names none.
DEFAULT_BACKEND = "llama_cpp"

#: One device: its index or UUID, on any node or on the one that stands before the slash.
_DEVICE = re.compile(r"(?:[^/\s,]+/)?(?:0|[1-9][0-9]{0,3}|(?:GPU|MIG)-[0-9A-Za-z-]+)")


class Group(BaseModel):
    """Models that are placed with an eye on each other; all members of a group say the same about `devices`.

    `separate`: no two models of the group stand on one device. `shared`: they go where another of the group already
    is, so that (say) a model and its draft or embedding model meet. `group: NAME` is short for
    `group: {name: NAME, devices: separate}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The models that name the same group belong together.
    name: Annotated[str, Field(min_length=1)]
    #: Whether they keep apart or go to the same device.
    devices: Literal["separate", "shared"] = "separate"


class Price(BaseModel):
    """What a million tokens cost, in the currency of the keys' budgets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Of the prompt.
    input: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    #: Of the answer.
    output: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class ModelConfig(BaseModel):
    """One model, under its public id: the keys that every backend has. Times in seconds, memory in MiB."""

    # The base of a union that is told apart by `backend`: validating a mapping as `ModelConfig` gives an instance of
    # the subclass of its backend, which has the keys of that engine too (`backends.py`). Keys with an alias are read in
    # both spellings. `cluster.generated` takes what a key means from the comment above it.

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    #: Its engines can give back their devices and keep their weights in the host's memory (level 1).
    sleeps: ClassVar[bool] = False
    #: Its weights are a folder (`hf:owner/repo` is one, too), and not one file; None: either.
    in_folder: ClassVar[bool | None] = False
    #: Its engine is a server that a command starts; `python` is then not what hosts the engine.
    starts_command: ClassVar[bool] = False
    #: It is behind a remote API, which costs money: only requests that allow it may go there.
    is_remote: ClassVar[bool] = False
    #: Its engines can save conversations beyond their end.
    remembers: ClassVar[bool] = False
    #: The subclass of each backend's name. Any, since in this class `type` is a key of the configuration.
    backends: ClassVar[dict[str, Any]] = {}

    #: The engine that runs it.
    backend: str = DEFAULT_BACKEND
    #: What the model is for, as `/v1/models` tells it.
    type: Literal["llm", "embedding", "rerank"] = "llm"
    #: Its weights: a path, `hf:owner/repo/file.gguf`, `hf:owner/repo`, or `package:name/file.gguf`.
    model_path: str | None = None
    #: What kind of weights lie there (`hf`, `awq`, `gguf`, …), where the name does not say so. A request for a model in
    #: a format that its backend does not read is refused.
    weights_format: Annotated[str | None, Field(alias="format")] = None
    #: Other names for it. One that several models share, each with a `weight`, is one public name with variants.
    aliases: tuple[str, ...] = ()
    #: A chat template, by name or in Jinja, for a model that brings none or another one.
    prompt_format: str | None = None
    #: What its template is told where a request says nothing of it.
    enable_thinking: bool | None = None
    #: Load it at start.
    enabled: bool = False
    #: `manual`: only an operator loads it, no request does.
    activation: Literal["on_demand", "manual"] = "on_demand"
    #: It never makes room for another model.
    pinned: bool = False
    #: Devices of one replica; fractions share one, 0 runs on the CPU.
    num_gpus: Annotated[float, Field(ge=0)] = 0
    #: CPUs that Ray books for one replica.
    num_cpus: Annotated[float, Field(ge=0)] = 0
    #: The only devices that it may stand on: an index, a UUID, either after `node/`, or a list of them.
    gpu: tuple[str, ...] = ()
    #: The interpreter of another environment, which runs the engine.
    python: Annotated[str, Field(min_length=1)] | None = None
    #: What a replica takes, in MiB. Unset: estimated from its files, then measured.
    memory_mib: Annotated[int, Field(ge=1)] | None = None
    #: So many replicas are always loaded.
    min_replicas: Annotated[int, Field(ge=0, alias="replicas")] = 0
    #: At most so many.
    max_replicas: Annotated[int, Field(ge=1, alias="replica_max")] = 1
    #: Slots: sequences that one replica runs at a time.
    target_inflight: Annotated[int, Field(ge=1, le=256)] = 8
    #: Requests that may wait for this model; the pool's `queue_max_size` holds, too.
    max_queued: Annotated[int, Field(ge=0)] | None = None
    #: How long it stays loaded without a request; 0 = until its room is needed. Unset: `default_idle_timeout`.
    idle_timeout: Annotated[float, Field(ge=0)] | None = None
    #: How long a replica without a loaded engine stays; 0 = until its room is needed.
    sleep_timeout: Annotated[float, Field(ge=0)] = 0
    #: 1 keeps the process of an engine that loses its devices, with its weights in the host's memory, where that has
    #: room; 2 ends it. `auto`: whichever brings it back sooner, as learned. Engines that cannot sleep always end.
    sleep_level: Literal["auto", 1, 2] = "auto"
    #: The longest that its load may take. Unset: `startup_timeout`.
    load_timeout: Annotated[float, Field(gt=0)] | None = None
    #: The longest that a request of it may take. Unset: `request_timeout_seconds`.
    request_timeout: Annotated[float, Field(gt=0)] | None = None
    #: The model on a CPU that takes what comes while `offload_queue_threshold` requests wait here.
    cpu_offload_model: str | None = None
    #: Models that take what comes while this one cannot serve at all (it fails to load, or is being unloaded), in
    #: their order.
    fallbacks: tuple[str, ...] = ()
    #: Makes it a variant of the alias that it shares with others: each answers in proportion to its weight.
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    #: Models that are placed with an eye on each other.
    group: Group | None = None
    #: What its tokens count for in a key's budget.
    price: Price | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name in get_args(cls.model_fields["backend"].annotation):
            ModelConfig.backends[name] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_backend(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Hand a mapping on to the class of its backend; that class itself, and an instance, are taken as they are."""
        if cls is not ModelConfig or not isinstance(data, dict):
            return handler(data)
        return backend_class(data).model_validate(data)  # type: ignore[return-value]

    @model_validator(mode="after")
    def _can_sleep_as_asked(self) -> Self:
        if self.sleep_level == 1 and not self.sleeps:
            raise ValueError(f"sleep_level: an engine of backend {self.backend} cannot sleep, only end: 2")
        return self

    @field_validator("gpu", mode="before")
    @classmethod
    def _device_list(cls, value: Any) -> tuple[str, ...]:
        listed = () if value is None else value if isinstance(value, list | tuple) else (value,)
        devices = tuple(dict.fromkeys(_device(each) for each in listed))
        if len(devices) < len(listed):
            raise ValueError("a device stands there twice")
        return devices

    @field_validator("group", mode="before")
    @classmethod
    def _short_group(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"replicas ({self.min_replicas}) is larger than replica_max ({self.max_replicas})")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError("num_gpus above 1 must be a whole number of devices")
        if self.gpu and not self.num_gpus:
            raise ValueError("gpu names devices, but num_gpus is 0: the model would run on the CPU")
        if self.weight is not None and not self.aliases:
            raise ValueError("weight needs an alias: the public name that the variants share")
        return self

    @property
    def format(self) -> str | None:
        """What kind of weights the model has, in a word; None where nothing tells."""
        return self.weights_format or _format_of(self.model_path)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that its backend reads, the best first; none where the pool cannot know."""
        return ()

    @property
    def slots(self) -> int:
        """How many sequences one replica runs at a time."""
        return self.target_inflight

    def bounded(self, running_requests: int, total_tokens: int) -> Self:
        """The model within the pool's bounds on SGLang's servers, which mean nothing to other backends."""
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Every file or folder that the engine reads, as the configuration names them."""
        return (self.model_path,) if self.model_path else ()

    @property
    def context_length(self) -> int | None:
        """The context of one request in tokens, where it is configured."""
        return None

    @property
    def revision(self) -> str:
        """A digest of everything that a running engine was started with: if it changes, the replica is out of date."""
        engine = self.model_dump(mode="json", exclude=set(SCHEDULING_KEYS))
        return hashlib.sha256(json.dumps(engine, sort_keys=True).encode()).hexdigest()[:16]


def backend_class(data: Mapping[str, Any]) -> type[ModelConfig]:
    """The configuration class of the backend that a model's keys name. Raises `ValidationError` for an unknown one."""
    name = data.get("backend", DEFAULT_BACKEND)
    found: type[ModelConfig] | None = ModelConfig.backends.get(name) if isinstance(name, str) else None
    if found is None:
        known = list(ModelConfig.backends)
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
        unknown = PydanticCustomError("unknown_backend", f"no such backend, {hint}")
        mistake = InitErrorDetails(type=unknown, loc=("backend",), input=name)
        raise ValidationError.from_exception_data("ModelConfig", [mistake])
    return found


def _format_of(model_path: str | None) -> str | None:
    if model_path is None:
        return None
    return "gguf" if model_path.lower().endswith(".gguf") else "hf"


def _device(value: Any) -> str:
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not _DEVICE.fullmatch(text):
        raise ValueError(f"{value!r} is no device: give an index, a UUID (GPU-…), or either after 'node/'")
    return text


#: Keys that tell the ledger what to do with a model and its engine nothing: a change of these drains no replica. A
#: key that is not listed here does; that is the safe side for one that is forgotten.
SCHEDULING_KEYS = (
    "type",
    "aliases",
    "enabled",
    "activation",
    "pinned",
    "memory_mib",
    "min_replicas",
    "max_replicas",
    "max_queued",
    "idle_timeout",
    "sleep_timeout",
    "sleep_level",
    "load_timeout",
    "request_timeout",
    "cpu_offload_model",
    "fallbacks",
    "weight",
    "group",
    "price",
    "remote_budget",
    "remote_budget_per_key",
)


class ServerEntry(BaseModel):
    """One external OpenAI-compatible server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Where it answers, without `/v1`.
    url: Annotated[str, Field(pattern=r"^https?://[^/\s@]+(/\S*)?$")]
    #: Requests that it is sent at a time.
    max_concurrent: Annotated[int, Field(ge=1, le=4096)] = 1
    #: The environment variable that holds its key.
    api_key_env: str | None = None
    #: What it runs: `lmstudio`, `ollama`, `vllm`, `llama_server`, … Every type but `vllm`, `sglang`, `tgi`,
    #: `llama_server` and `slotpool` is taken to load models just in time, and never gets two models at once.
    server_type: str | None = None

    def spec(self) -> ServerSpec:
        """The server as the ledger sees it."""
        return ServerSpec(self.url, self.max_concurrent, loads_just_in_time(self.server_type), self.api_key_env)
