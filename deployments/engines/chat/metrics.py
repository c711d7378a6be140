"""The `metrics` object of CONTRACT section 2: where the time of one call went, in float milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.engines.protocol import Call


@dataclass(frozen=True, slots=True)
class Timing:
    """What an engine measured, in seconds since the call entered it; None where it does not know."""

    total_s: float
    tokenize_s: float | None = None
    backend_start_s: float | None = None
    first_token_s: float | None = None
    backend_end_s: float | None = None


def metrics_object(call: Call, timing: Timing, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """All members of the contract; nested as it says: pool >= engine >= backend."""
    start, first, end = timing.backend_start_s, timing.first_token_s, timing.backend_end_s
    backend = _between(start, end)
    return {
        "backend_inference_wall_ms": _ms(backend),
        "engine_total_wall_ms": _ms(timing.total_s),
        "engine_outside_backend_wall_ms": None if backend is None else _ms(max(0.0, timing.total_s - backend)),
        "pool_total_wall_ms": round(call.pool_elapsed_ms + timing.total_s * 1e3, 3),
        "engine_queue_wait_ms": call.queue_wait_ms,
        "engine_load_wait_ms": call.load_wait_ms,
        "engine_tokenize_ms": _ms(timing.tokenize_s),
        "gpu_time_to_first_token_ms": _ms(_between(start, first)),
        "gpu_generate_total_ms": _ms(backend),
        "gpu_decode_after_first_token_ms": _ms(_between(first, end)),
        "engine_prompt_tokens": prompt_tokens,
        "engine_output_tokens": output_tokens,
        "engine_tokens_per_second": round(output_tokens / backend, 3) if backend else None,
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
