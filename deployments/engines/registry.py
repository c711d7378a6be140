"""The backends: one entry for each, with all that the pool needs to know of an engine before it runs.

A new engine takes a configuration class (`cluster/config/backends.py`) and an entry here. Engine libraries are
imported inside an entry's functions only, when a model of that backend is really used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from cluster.config import (
    Ct2Model,
    ExllamaModel,
    FakeModel,
    LaunchedModel,
    LlamaCppModel,
    ModelConfig,
    RemoteModel,
    ServerModel,
    SglangModel,
    VllmModel,
)
from deployments.engines.protocol import Engine
from deployments.engines.vllm import routes as vllm_routes
from deployments.schemas import CHAT, EMBEDDINGS, PATHS, SERVED, TOKENIZE

M = TypeVar("M", bound=ModelConfig)

#: What servers with an OpenAI interface know nothing of.
REMOTE_UNUSED = frozenset({"beam_size", "top_k", "repetition_penalty"})


@dataclass(frozen=True, slots=True)
class Backend(Generic[M]):
    """What one backend is to the pool.

    `build` makes the engine of a model, by its id, configuration and file, not loaded yet and so cheap. `estimate`
    tells from the files what a replica will take, in MiB, or None; it may block for milliseconds. `paths` are the
    routes that its engines serve, and `raw` says whether they answer any other path too; `offers` tells those of one
    model, where its configuration makes a difference. `unused` are the fields of the pool dialect's `decoding` that
    they cannot use.
    """

    config: type[M]
    build: Callable[[str, M, str], Engine]
    estimate: Callable[[M, Path], int | None]
    paths: frozenset[str]
    raw: bool = False
    unused: frozenset[str] = frozenset()
    offers: Callable[[M], frozenset[str]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What `backend` may be called in a configuration; the first is the name that the pool shows."""
        return get_args(self.config.model_fields["backend"].annotation)


def backend_of(model: ModelConfig) -> Backend[Any]:
    """The entry of a model's backend."""
    return _BY_CONFIG[type(model)]


def capabilities(model: ModelConfig) -> list[str]:
    """What clients may ask of a model, in words: `chat`, `completions`, `embeddings`, …"""
    backend = backend_of(model)
    paths = backend.paths if backend.offers is None else backend.offers(model)
    return sorted({path.removeprefix("/v1").removesuffix("/completions").strip("/") or "completions" for path in paths})


def unused_decoding(model: ModelConfig | None) -> frozenset[str]:
    """The fields of the pool dialect's `decoding` that change nothing with this model; None is one of a server's."""
    return REMOTE_UNUSED if model is None else backend_of(model).unused


def counts_tokens(model: ModelConfig | None) -> bool:
    """Whether a model tokenizes a chat by itself, in the pool's words; None is one of a server's."""
    return model is not None and TOKENIZE in backend_of(model).paths


def build_engine(model_id: str, model: ModelConfig, path: str) -> Engine:
    """The engine of a configured model whose file lies at `path`; not loaded yet, so cheap."""
    return backend_of(model).build(model_id, model, path)


def estimate_mib(model: ModelConfig, path: Path) -> int | None:
    """What one replica will take, in MiB, from the file or folder at `path`; None if nothing can be told from it."""
    return backend_of(model).estimate(model, path)


def _build_fake(model_id: str, model: FakeModel, path: str) -> Engine:
    from deployments.engines.fake import FakeEngine

    return FakeEngine(model_id, model.engine_kwargs)


def _build_llama_cpp(model_id: str, model: LlamaCppModel, path: str) -> Engine:
    from deployments.engines.llama_cpp.engine import LlamaCppEngine

    return LlamaCppEngine(
        path,
        model_id=model_id,
        slots=model.target_inflight,
        n_ctx=model.gguf_n_ctx,
        n_gpu_layers=model.gguf_n_gpu_layers if model.num_gpus else 0,
        flash_attn=model.gguf_flash_attn,
        type_k=model.gguf_type_k,
        type_v=model.gguf_type_v,
        lora=tuple((adapter.path, adapter.scale) for adapter in model.gguf_lora),
        tensor_split=model.gguf_tensor_split,
        prompt_format=model.prompt_format,
        enable_thinking=model.enable_thinking,
        **model.engine_kwargs.model_dump(exclude_none=True),
    )


def _build_server(model_id: str, model: LaunchedModel, path: str) -> Engine:
    from deployments.engines.managed_server import ManagedServer

    return ManagedServer(model_id, model, path)


def _build_sglang(model_id: str, model: SglangModel, path: str) -> Engine:
    from deployments.engines.managed_server import SleepingServer

    return SleepingServer(model_id, model, path)


def _build_remote(model_id: str, model: RemoteModel, path: str) -> Engine:
    from deployments.engines.remote_api import RemoteApi

    return RemoteApi(model_id, model)


def _build_ctranslate2(model_id: str, model: Ct2Model, path: str) -> Engine:
    from deployments.engines.ctranslate2.engine import Ct2Engine

    return Ct2Engine(model_id, model, path)


def _build_exllamav3(model_id: str, model: ExllamaModel, path: str) -> Engine:
    from deployments.engines.exllamav3.engine import ExllamaEngine

    return ExllamaEngine(model_id, model, path)


def _build_vllm(model_id: str, model: VllmModel, path: str) -> Engine:
    from deployments.engines.vllm.engine import VllmEngine

    return VllmEngine(model_id, model, path)


def _estimate_nothing(model: ModelConfig, path: Path) -> int | None:
    return None


def _estimate_llama_cpp(model: LlamaCppModel, path: Path) -> int | None:
    from deployments.engines.llama_cpp import memory

    return memory.estimate_mib(model, path)


def _estimate_ctranslate2(model: Ct2Model, path: Path) -> int | None:
    from deployments.engines.ctranslate2 import memory

    return memory.estimate_mib(model, path)


def _estimate_exllamav3(model: ExllamaModel, path: Path) -> int | None:
    from deployments.engines.exllamav3 import memory

    return memory.estimate_mib(model, path)


def _estimate_vllm(model: VllmModel, path: Path) -> int | None:
    from deployments.engines.vllm import memory

    return memory.estimate_mib(model, path)


BACKENDS: tuple[Backend[Any], ...] = (
    Backend(LlamaCppModel, _build_llama_cpp, _estimate_llama_cpp, PATHS, unused=frozenset({"beam_size"})),
    Backend(SglangModel, _build_sglang, _estimate_nothing, SERVED, raw=True, unused=frozenset({"beam_size"})),
    Backend(ServerModel, _build_server, _estimate_nothing, SERVED, raw=True, unused=REMOTE_UNUSED),
    Backend(RemoteModel, _build_remote, _estimate_nothing, frozenset({CHAT}), unused=REMOTE_UNUSED),
    Backend(
        VllmModel,
        _build_vllm,
        _estimate_vllm,
        vllm_routes.ROUTES,
        unused=frozenset({"beam_size"}),
        offers=vllm_routes.offered,
    ),
    Backend(Ct2Model, _build_ctranslate2, _estimate_ctranslate2, PATHS - {EMBEDDINGS}),
    Backend(
        ExllamaModel,
        _build_exllamav3,
        _estimate_exllamav3,
        PATHS - {EMBEDDINGS},
        unused=frozenset({"beam_size"}),
    ),
    Backend(FakeModel, _build_fake, _estimate_nothing, PATHS, raw=True, unused=frozenset({"beam_size"})),
)
_BY_CONFIG = {backend.config: backend for backend in BACKENDS}
