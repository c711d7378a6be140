"""How much memory a model will take, estimated from its files before it was ever loaded.

The estimate decides what may stand beside what until a first load has been measured. It errs on the large side, by
some percent: a model that is thought too large waits, one that is thought too small brings others down. What the
llama.cpp engine reserves by default is computed here for both, so that estimate and engine cannot disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.engines.llama_cpp.gguf import GgufError, GgufHeader, read_header
from deployments.weights import weights_at_hand

if TYPE_CHECKING:
    from cluster.config import LlamaCppModel

logger = logging.getLogger("slotpool.memory")

MIB = 1 << 20

#: Bytes of one element of a KV cache, blocks' scales included.
KV_TYPE_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

#: The KV cache that is reserved by default stays below this, or below the weights' own size where they are larger.
DEFAULT_KV_BYTES = 1 << 30
DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 2048
#: Tokens that one step of llama.cpp evaluates at most, unless `engine_kwargs.n_batch` says otherwise.
DEFAULT_BATCH = 512
#: Outputs of one step beyond one for each slot; they bound the buffer of logits.
SPARE_OUTPUTS = 32

#: llama.cpp's library and its tables of the vocabulary (docs/measurements.md).
LLAMA_CPP_BASE = 16 * MIB
BYTES_PER_TOKEN_OF_VOCABULARY = 256
#: What a process takes on a device before it has loaded anything.
CUDA_CONTEXT = 512 * MIB
#: An engine that reads safetensors has a runtime of its own (PyTorch, CUDA context), and buffers in proportion.
SAFETENSORS_BASE = 1024 * MIB
SAFETENSORS_SHARE = 0.1


def cells(n_ctx: int) -> int:
    """llama.cpp rounds a sequence's share of the cache up to whole blocks of 256 cells."""
    return -(-n_ctx // 256) * 256


def context_per_slot(
    n_ctx: int | None, *, trained: int, slots: int, kv_bytes_per_token: float, weight_bytes: int
) -> int:
    """The configured context, or the largest of 8192, 4096, 2048 tokens whose KV cache is not out of proportion.

    An 8192-token default for 16 slots of a 135M model would take 3 GB for a model of 98 MB.
    """
    if n_ctx is not None:
        return n_ctx
    chosen = min(trained, DEFAULT_CONTEXT)
    limit = max(DEFAULT_KV_BYTES, weight_bytes)
    while chosen > LEAST_CONTEXT and chosen * slots * kv_bytes_per_token > limit:
        chosen //= 2
    return cells(chosen)


def kv_bytes_per_token(heads: int, key_length: int, value_length: int, type_k: str | None, type_v: str | None) -> float:
    """Bytes that one token takes in the cache; `heads` is the number of KV heads of all layers together."""
    return heads * (key_length * KV_TYPE_BYTES[type_k or "f16"] + value_length * KV_TYPE_BYTES[type_v or "f16"])


def estimate_mib(model: LlamaCppModel, path: Path) -> int | None:
    """What one replica will take, in MiB, from the file or folder at `path`; None if nothing can be told from it.

    Of a model on a GPU it is the device's memory: of `gguf_n_gpu_layers` of its layers, where so many are configured.
    Blocks for milliseconds. A broken file is logged with what is wrong with it, and has no estimate.
    """
    try:
        if path.suffix == ".gguf":
            return -(-_gguf_bytes(model, read_header(path)) // MIB)
        weights = _weight_files(path)
    except (GgufError, OSError) as error:
        logger.warning("no memory estimate: %s", error)
        return None
    if not weights:
        return None
    return -(-int(sum(weights) * (1 + SAFETENSORS_SHARE) + SAFETENSORS_BASE) // MIB)


def _weight_files(path: Path) -> list[int]:
    """The sizes of a folder's weights, or of one file of them."""
    if path.is_file():
        return [path.stat().st_size] if path.suffix == ".safetensors" else []
    for pattern in ("*.safetensors", "model.bin"):
        found = [file.stat().st_size for file in path.glob(pattern)]
        if found:
            return found
    return []


def _gguf_bytes(model: LlamaCppModel, header: GgufHeader) -> int:
    slots = model.target_inflight
    n_batch = max(model.engine_kwargs.n_batch or DEFAULT_BATCH, slots)
    heads = _number(header, "attention.head_count", 1)
    width = _number(header, "embedding_length", 0)
    head_length = width // max(1, heads)
    per_token = kv_bytes_per_token(
        _kv_heads(header, heads),
        _number(header, "attention.key_length", head_length),
        _number(header, "attention.value_length", head_length),
        model.gguf_type_k,
        model.gguf_type_v,
    )
    context = context_per_slot(
        model.gguf_n_ctx,
        trained=_number(header, "context_length", LEAST_CONTEXT),
        slots=slots,
        kv_bytes_per_token=per_token,
        weight_bytes=header.tensor_bytes,
    )
    cache = int(cells(context) * slots * per_token)
    vocabulary = header.lengths.get("tokenizer.ggml.tokens", 0)
    # One step's activations and its logits, which exist twice: in the graph and in the buffer that is read.
    compute = n_batch * 4 * (8 * width + 3 * _number(header, "feed_forward_length", 0))
    compute += min(n_batch, slots + SPARE_OUTPUTS) * vocabulary * 8
    if model.gguf_flash_attn == "off":
        compute += n_batch * heads * cells(context) * 4
    weights = header.tensor_bytes + _adapter_bytes(model)
    if model.num_gpus:
        return int((weights + cache) * _offloaded(model, header) * _unevenness(model)) + compute + CUDA_CONTEXT
    tables = LLAMA_CPP_BASE + vocabulary * BYTES_PER_TOKEN_OF_VOCABULARY
    return weights + cache + compute + tables


def _adapter_bytes(model: LlamaCppModel) -> int:
    """What the adapters that are here already add to the weights."""
    files = (weights_at_hand(adapter.path) for adapter in model.gguf_lora)
    return sum(file.stat().st_size for file in files if file is not None)


def _unevenness(model: LlamaCppModel) -> float:
    """How much more the device with the largest share takes than each of several with equal ones.

    The books know one figure for all devices of a replica, so it is the largest that counts.
    """
    split = model.gguf_tensor_split
    return max(split) * len(split) / sum(split) if split else 1.0


def _offloaded(model: LlamaCppModel, header: GgufHeader) -> float:
    """The part of a model's layers that its device takes; llama.cpp counts the output as one more layer."""
    if model.gguf_n_gpu_layers < 0:
        return 1.0
    return min(1.0, model.gguf_n_gpu_layers / (_number(header, "block_count", 0) + 1))


def _kv_heads(header: GgufHeader, heads: int) -> int:
    """The KV heads of all layers together; some models have another number in each layer."""
    layers = _number(header, "block_count", 0)
    per_layer = header.of_architecture("attention.head_count_kv", heads)
    return sum(per_layer) if isinstance(per_layer, list) else layers * int(per_layer)


def _number(header: GgufHeader, key: str, default: int) -> int:
    value = header.of_architecture(key, default)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return max(map(int, value), default=default)
    return int(value) if isinstance(value, int | float) else default
