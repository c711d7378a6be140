"""The `metrics` object of CONTRACT section 2: where the time of one call went, in float milliseconds."""

from __future__ import annotations

from typing import Any

from deployments.engines.protocol import Call, Report


def metrics_object(call: Call, report: Report) -> dict[str, Any]:
    """All members of the contract, null where unknown; nested as it says: pool >= engine >= backend."""
    total, backend, output_tokens = report.total_ms, report.backend_ms, report.output_tokens
    first = _since_backend_began(report)
    return {
        "backend_inference_wall_ms": _ms(backend),
        "engine_total_wall_ms": _ms(total),
        "engine_outside_backend_wall_ms": _difference(total, backend),
        "pool_total_wall_ms": None if total is None else _ms(call.pool_elapsed_ms + total),
        "engine_queue_wait_ms": call.queue_wait_ms,
        "engine_load_wait_ms": call.load_wait_ms,
        "engine_tokenize_ms": _ms(report.tokenize_ms),
        "gpu_time_to_first_token_ms": _ms(first),
        "gpu_generate_total_ms": _ms(backend),
        "gpu_decode_after_first_token_ms": _difference(backend, first),
        "engine_prompt_tokens": report.prompt_tokens,
        "engine_output_tokens": output_tokens,
        "engine_tokens_per_second": _rate(output_tokens, backend),
    }


def _since_backend_began(report: Report) -> float | None:
    """From the backend's begin to the first token, in milliseconds."""
    if report.ttft_ms is None or report.tokenize_ms is None or report.queue_ms is None:
        return None
    return max(0.0, report.ttft_ms - report.tokenize_ms - report.queue_ms)


def _difference(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else _ms(max(0.0, whole - part))


def _ms(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _rate(tokens: int | None, milliseconds: float | None) -> float | None:
    return None if tokens is None or not milliseconds else round(tokens / milliseconds * 1e3, 3)
