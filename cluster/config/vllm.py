"""A model in vLLM: what its configuration may say beside the keys that all models share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from cluster.config.models import ModelConfig

#: Arguments of vLLM that the pool gives itself, with the key of the model that says the same; None where there is none.
RESERVED: dict[str, str | None] = {
    "model": "model_path",
    "model_tag": "model_path",
    "served_model_name": "aliases",
    "tensor_parallel_size": "num_gpus",
    "max_num_seqs": "target_inflight",
    "chat_template": "prompt_format",
    "enable_sleep_mode": "sleep_level",
    "runner": "type",
    **dict.fromkeys(
        (
            "api_key",
            "api_server_count",
            "config",
            "disable_log_stats",
            "distributed_executor_backend",
            "enable_force_include_usage",
            "enable_per_request_metrics",
            "enable_prompt_tokens_details",
            "grpc",
            "grpc_port",
            "headless",
            "host",
            "middleware",
            "port",
            "root_path",
            "scheduling_policy",
            "sse_keep_alive_interval",
            "uds",
        )
    ),
}


class VllmModel(ModelConfig):
    """A Hugging Face folder in vLLM, or `hf:owner/repo`.

    `num_gpus` above 1 is tensor parallelism on one node.
    """

    sleeps = True
    in_folder = True

    backend: Literal["vllm"] = "vllm"
    #: Arguments of `vllm serve`, with underscores (`max_model_len: 8192`). The pool refuses those that it gives itself;
    #: the others are checked when the model is loaded, by the vLLM that loads it.
    engine_kwargs: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("engine_kwargs")
    @classmethod
    def _not_the_pools_own(cls, given: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in given:
            plain = name.lstrip("-").replace("-", "_")
            if plain in RESERVED:
                instead = RESERVED[plain]
                raise ValueError(
                    f"{name}: " + (f"say it with the model's {instead!r}" if instead else "is the pool's own")
                )
            if plain != name:
                raise ValueError(f"{name}: did you mean {plain!r}?")
        return given

    @model_validator(mode="after")
    def _has_a_folder(self) -> VllmModel:
        if not self.model_path:
            raise ValueError("model_path is required for backend vllm")
        return self

    @property
    def formats(self) -> tuple[str, ...]:
        return ("hf", "awq")

    @property
    def context_length(self) -> int | None:
        length = self.engine_kwargs.get("max_model_len")
        return length if isinstance(length, int) else None
