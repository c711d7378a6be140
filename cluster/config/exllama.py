"""A model in ExLlamaV3: what its configuration may say beside the keys that all models share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.config.models import ModelConfig

#: The library keeps its cache in pages of so many tokens.
PAGE = 256

CacheBits = Annotated[int, Field(ge=2, le=8)]


class ExllamaKwargs(BaseModel):
    """`engine_kwargs` of `backend: exllamav3`. A key that is unset leaves the choice to the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The context of one request in tokens.
    n_ctx: Annotated[int, Field(ge=1)] | None = None
    #: Tokens of a prompt that are evaluated at once, a multiple of 256.
    max_chunk_size: Annotated[int, Field(ge=PAGE, multiple_of=PAGE)] | None = None
    #: Split each layer over the devices; else some layers are on each.
    tensor_parallel: bool = False


class ExllamaModel(ModelConfig):
    """A folder of ExLlamaV3's format (EXL3), or one of plain Hugging Face weights. It needs an NVIDIA GPU.

    Its cache is kept in 16 bits, or in as many as `exllama_cache_quant` says, or `exllama_cache_k_bits` and
    `exllama_cache_v_bits` do.
    """

    in_folder = True

    backend: Literal["exllamav3"] = "exllamav3"
    #: Tokens that the cache has for all requests together, a multiple of 256; unset, the model's own context, at
    #: most 16384.
    exllama_cache_size: Annotated[int, Field(ge=PAGE, multiple_of=PAGE)] | None = None
    #: Bits of a number in the cache: `8`, or `8,4` for keys and values.
    exllama_cache_quant: Literal["8", "8,4"] | None = None
    #: Bits of a key's number in the cache.
    exllama_cache_k_bits: CacheBits | None = None
    #: Bits of a value's number in the cache.
    exllama_cache_v_bits: CacheBits | None = None
    #: A request reserves room in the cache for so many tokens at a time; unset, for all that it may make.
    exllama_max_rq_tokens: Annotated[int, Field(ge=1)] | None = None
    #: The engine's own arguments.
    engine_kwargs: ExllamaKwargs = ExllamaKwargs()

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("exllama_cache_quant", mode="before")
    @classmethod
    def _number_given(cls, value: Any) -> Any:
        # In YAML 8 is a number.
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_cache(self) -> ExllamaModel:
        bits = (self.exllama_cache_k_bits, self.exllama_cache_v_bits)
        if (bits[0] is None) != (bits[1] is None):
            raise ValueError("exllama_cache_k_bits and exllama_cache_v_bits are needed together")
        if bits[0] is not None and self.exllama_cache_quant is not None:
            raise ValueError("exllama_cache_quant and exllama_cache_k_bits, exllama_cache_v_bits exclude each other")
        return self

    @model_validator(mode="after")
    def _has_a_folder(self) -> ExllamaModel:
        if not self.model_path:
            raise ValueError(f"model_path is required for backend {self.backend}")
        return self

    @property
    def cache_bits(self) -> tuple[int, int] | None:
        """Bits of a key's and of a value's number in the cache; None = 16, as they are computed."""
        if self.exllama_cache_quant is not None:
            return (8, 4) if self.exllama_cache_quant == "8,4" else (8, 8)
        if self.exllama_cache_k_bits is None or self.exllama_cache_v_bits is None:
            return None
        return self.exllama_cache_k_bits, self.exllama_cache_v_bits

    @property
    def format(self) -> str:
        return self.weights_format or "exl3"

    @property
    def formats(self) -> tuple[str, ...]:
        return ("exl3", "hf")

    @property
    def context_length(self) -> int | None:
        return self.engine_kwargs.n_ctx
