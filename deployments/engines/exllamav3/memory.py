"""How much memory a model takes in ExLlamaV3, before it was ever loaded: its weights, and a cache of known size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import ExllamaModel

MIB = 1 << 20
#: CUDA's own, the library's kernels and the activations of one chunk, in MiB.
DEVICE_BASE = 900
#: Tokens of the cache where the configuration does not say, if the model's own context has as many.
CACHE_TOKENS = 16_384
#: A quantised cache has one scale of 2 bytes for so many numbers.
SCALE_GROUP = 32


def estimate_mib(model: ExllamaModel, path: Path) -> int | None:
    """What one replica will take, in MiB, from the folder at `path`; None if there are no weights in it."""
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    if not weights:
        return None
    try:
        config = json.loads((path / "config.json").read_text())
        per_token = cache_bytes_per_token(config, model.cache_bits)
        size = model.exllama_cache_size or default_cache_size(int(_of(config, "max_position_embeddings")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        per_token = size = 0  # It will not be loaded, either.
    return (weights + per_token * size) // MIB + DEVICE_BASE


def default_cache_size(context: int) -> int:
    """The cache of a model with this context in whole pages, in tokens."""
    return max(256, min(context, CACHE_TOKENS) // 256 * 256)


def cache_bytes_per_token(config: dict[str, Any], bits: tuple[int, int] | None) -> int:
    """What one token takes in the cache of a model with keys and values of its own in every layer."""
    heads = int(_of(config, "num_attention_heads"))
    size = int(_of(config, "head_dim", 0) or _of(config, "hidden_size") // heads)
    numbers = int(_of(config, "num_key_value_heads", heads)) * size
    # Of keys and values together; 16 bits each need no scales.
    whole = 4 * numbers if bits is None else sum(numbers * each // 8 + 2 * (numbers // SCALE_GROUP) for each in bits)
    return int(_of(config, "num_hidden_layers")) * whole


def _of(config: dict[str, Any], key: str, *default: Any) -> Any:
    """A member of the model's configuration, which models of several parts have in one of their own."""
    for part in (config, config.get("text_config") or {}):
        if part.get(key) is not None:
            return part[key]
    if not default:
        raise KeyError(key)
    return default[0]
