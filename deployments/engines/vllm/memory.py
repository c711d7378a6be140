"""How much memory a vLLM model takes: estimated from its files, and seen once it is loaded.

On a device vLLM takes what it is told to (`gpu_memory_utilization`), and fills it with its KV cache: what it was asked
for says more than any file. On the host it takes its weights, a KV cache of known size, and a Python for each process.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.config import VllmModel
from deployments.host_memory import tree_device_mib, tree_mib

MIB = 1 << 20
#: vLLM's processes without a model: Python with PyTorch, three times (docs/measurements.md).
HOST_BASE_MIB = 1500
#: Weights are a little larger in memory than on the disk.
WEIGHTS_SHARE = 1.1


def estimate_mib(model: VllmModel, path: Path) -> int | None:
    """What one replica will take, in MiB, from the folder at `path`; None if nothing can be told from it.

    Of a model on a GPU nothing can: it takes a part of the device, whatever its files are.
    """
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    if model.num_gpus or not weights:
        return None
    return int(weights * WEIGHTS_SHARE / MIB) + kv_cache_mib(model) + HOST_BASE_MIB


def kv_cache_mib(model: VllmModel) -> int:
    """The KV cache as far as the configuration tells it; 0 where vLLM chooses."""
    given = model.engine_kwargs.get("kv_cache_memory_bytes")
    return given // MIB if isinstance(given, int) else 0


def memory_mib(model: VllmModel, path: str) -> int | None:
    """What the loaded engine takes, in MiB: of its devices, or of the host. Blocks for milliseconds.

    A cache that was reserved is taken, even where no token has been written to it yet.
    """
    if model.num_gpus:
        return tree_device_mib(os.getpid())
    return max(tree_mib(os.getpid()), estimate_mib(model, Path(path)) or 0)
