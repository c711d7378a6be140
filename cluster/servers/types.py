"""What the pool knows of the kinds of external servers: which load just in time, and how to keep a model loaded.

Pure functions; a kind that is not known is treated with care and not refused.
"""

from __future__ import annotations

from typing import Any

#: Servers that run all that they list at the same time, or drain by themselves before they swap.
SEVERAL_AT_ONCE = frozenset({"vllm", "sglang", "tgi", "llama_server", "llama_cpp", "slotpool"})

#: LM Studio's `ttl` has no word for "for ever", so a pinned model gets ten years.
FOREVER_S = 10 * 365 * 86_400


def normalise(server_type: str | None) -> str:
    """`LM Studio`, `lm-studio` and `lmstudio` are one kind; so are `llama-server` and `llama_server`."""
    name = (server_type or "").strip().lower().replace("-", "_").replace(" ", "_").replace(".", "_")
    return "lmstudio" if name == "lm_studio" else name


def loads_just_in_time(server_type: str | None) -> bool:
    """Whether a request for another model makes the server drop the one that runs. Unknown kinds are taken to."""
    return normalise(server_type) not in SEVERAL_AT_ONCE


def hold_fields(server_type: str | None, keep_alive_s: float) -> dict[str, Any]:
    """The fields beside a request's own that keep the server from unloading the model before `keep_alive_s`; -1 pins.

    The pool decides when a model's turn is over, so the server's own timer must not be shorter. LM Studio reads `ttl`
    on its OpenAI routes; Ollama reads `keep_alive` on those of its routes that know it and ignores it elsewhere
    (`OLLAMA_KEEP_ALIVE` sets it for the whole server). Others have no such field and get none.
    """
    kind = normalise(server_type)
    if kind == "ollama":
        return {"keep_alive": -1 if keep_alive_s < 0 else round(keep_alive_s)}
    if kind == "lmstudio":
        return {"ttl": FOREVER_S if keep_alive_s < 0 else max(1, round(keep_alive_s))}
    return {}


def base_url(url: str) -> str:
    """The URL before `/v1/…`, whether or not it was given with `/v1` or a slash at its end."""
    return url.rstrip("/").removesuffix("/v1")
