"""From a model's configuration to its engine. Engine libraries are imported only when such a model is made."""

from __future__ import annotations

from cluster.config import FakeFaults, LlamaCppKwargs, ModelConfig
from deployments.engines.protocol import Engine


def build_engine(model_id: str, model: ModelConfig, path: str) -> Engine:
    """The engine of a configured model whose file lies at `path`; not loaded yet, so cheap."""
    kwargs = model.engine_kwargs
    if isinstance(kwargs, FakeFaults):
        from deployments.engines.fake import FakeEngine

        return FakeEngine(model_id, kwargs)
    assert isinstance(kwargs, LlamaCppKwargs)
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
        prompt_format=model.prompt_format,
        **kwargs.model_dump(exclude_none=True),
    )
