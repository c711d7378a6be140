"""One configuration class for each backend: what a model of it may say beside the keys that all models share.

A class here and an entry in `deployments/engines/registry.py` are all that a new engine needs. The `backend` key picks
the class; a subclass of `ModelConfig` is known by the names in its own `backend`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.config.models import ModelConfig

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
FlashAttention = Literal["on", "off", "auto"]
ComputeType = Literal[
    "default",
    "auto",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float16",
    "bfloat16",
    "float32",
]


class FakeFaults(BaseModel):
    """`engine_kwargs` of `backend: fake`. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: What a load takes.
    load_s: Annotated[float, Field(ge=0)] = 0.0
    #: What it takes to wake where the replica sleeps with its engine.
    wake_s: Annotated[float, Field(ge=0)] = 0.0
    #: What the first token takes.
    ttft_s: Annotated[float, Field(ge=0)] = 0.0
    #: Tokens a second after it, for each stream.
    tokens_per_s: Annotated[float, Field(gt=0)] = 100.0
    #: How long an answer is where the request does not say it.
    tokens: Annotated[int, Field(ge=1)] = 16
    #: What goes wrong.
    fault: Literal[
        "none",
        "load_fails",
        "load_hangs",
        "wake_fails",
        "cut_mid_stream",
        "hang_mid_stream",
        "rate_limited",
        "malformed",
        "dies_after",
    ] = "none"


class LlamaCppKwargs(BaseModel):
    """`engine_kwargs` of `backend: llama_cpp`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Threads that evaluate. Unset: the engine's own choice.
    n_threads: Annotated[int, Field(ge=1)] | None = None
    #: Tokens of a prompt in one batch. Unset: the engine's own choice.
    n_batch: Annotated[int, Field(ge=32)] | None = None


class FakeModel(ModelConfig):
    """An engine without a model, for trying policies and injecting faults."""

    sleeps = True

    backend: Literal["fake"] = "fake"
    #: The engine's own arguments.
    engine_kwargs: FakeFaults = FakeFaults()

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def format(self) -> str:
        return "fake"


class LoraAdapter(BaseModel):
    """One LoRA adapter (a GGUF file, named like `model_path`) that is laid over the weights with this factor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: A GGUF file, named like `model_path`.
    path: Annotated[str, Field(min_length=1)]
    #: The factor.
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class LlamaCppModel(ModelConfig):
    """A GGUF file in llama.cpp. A key that is unset leaves the choice to the engine."""

    remembers = True

    backend: Literal["llama_cpp", "gguf"] = "llama_cpp"
    #: Tokens of context for each slot.
    gguf_n_ctx: Annotated[int, Field(ge=1)] | None = None
    #: Flash attention.
    gguf_flash_attn: FlashAttention = "auto"
    #: What the keys of the KV cache are kept as: `q8_0` is half of `f16`.
    gguf_type_k: CacheType | None = None
    #: What the values of the KV cache are kept as.
    gguf_type_v: CacheType | None = None
    #: Layers on the GPU; -1 = all.
    gguf_n_gpu_layers: int = -1
    #: Adapters that every request of this model gets: one, or a list; a path alone is one at full scale.
    gguf_lora: tuple[LoraAdapter, ...] = ()
    #: How much of the layers and of the cache each of `num_gpus` devices takes, in proportion. Unset: by their free
    #: memory.
    gguf_tensor_split: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    #: The engine's own arguments.
    engine_kwargs: LlamaCppKwargs = LlamaCppKwargs()

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("gguf_lora", mode="before")
    @classmethod
    def _adapter_list(cls, value: Any) -> Any:
        listed = () if value is None else value if isinstance(value, list | tuple) else (value,)
        return tuple({"path": each} if isinstance(each, str) else each for each in listed)

    @model_validator(mode="after")
    def _splits_over_its_devices(self) -> LlamaCppModel:
        split = self.gguf_tensor_split
        if split and (len(split) != self.num_gpus or not any(split)):
            raise ValueError(f"gguf_tensor_split needs a share for each of num_gpus ({self.num_gpus:g}) devices")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        return (*super().files, *(adapter.path for adapter in self.gguf_lora))

    @model_validator(mode="after")
    def _has_a_file(self) -> LlamaCppModel:
        if not self.model_path:
            raise ValueError(f"model_path is required for backend {self.backend}")
        return self

    @property
    def format(self) -> str:
        return self.weights_format or "gguf"

    @property
    def formats(self) -> tuple[str, ...]:
        return ("gguf",)

    @property
    def context_length(self) -> int | None:
        return self.gguf_n_ctx


class Ct2Kwargs(BaseModel):
    """`engine_kwargs` of `backend: ctranslate2`. A key that is unset leaves the choice to the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The context of one request in tokens.
    n_ctx: Annotated[int, Field(ge=1)] | None = None
    #: Batches that run at a time.
    inter_threads: Annotated[int, Field(ge=1)] | None = None
    #: Threads of each batch on a CPU.
    intra_threads: Annotated[int, Field(ge=1)] | None = None


class Ct2Model(ModelConfig):
    """A folder that was converted for CTranslate2 (a generator model), with its `tokenizer.json` beside it."""

    sleeps = True
    in_folder = True

    backend: Literal["ctranslate2", "ct2"] = "ctranslate2"
    #: What it computes with, whatever its weights are stored as; `default` keeps their own.
    compute_type: ComputeType = "default"
    #: The engine's own arguments.
    engine_kwargs: Ct2Kwargs = Ct2Kwargs()

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _has_a_folder(self) -> Ct2Model:
        if not self.model_path:
            raise ValueError(f"model_path is required for backend {self.backend}")
        return self

    @property
    def format(self) -> str:
        return self.weights_format or "ctranslate2"

    @property
    def formats(self) -> tuple[str, ...]:
        return ("ctranslate2",)

    @property
    def context_length(self) -> int | None:
        return self.engine_kwargs.n_ctx
