"""How much memory a converted model will take, before it was ever loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config import Ct2Model

#: The library and its threads, and what a process takes on a device before it has loaded anything, in MiB.
HOST_BASE, DEVICE_BASE = 64, 512
#: Activations and caches grow with what runs; as a part of the weights.
SHARE = 0.15
#: Bytes of a weight. What is stored has one size, and is computed with in another.
BYTES = {"int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}


def estimate_mib(model: Ct2Model, path: Path) -> int | None:
    """What one replica will take, in MiB, from the folder at `path`; None if there are no weights in it.

    Weights that are computed with as they are stored take their file's size. Where another type is configured, its
    file is taken to hold the smallest that converts to it, which errs on the large side.
    """
    try:
        stored = (path / "model.bin").stat().st_size / (1 << 20)
    except OSError:
        return None
    grows = max(1, BYTES.get(model.compute_type.partition("_")[0], 1)) if model.compute_type != "default" else 1
    return int(stored * grows * (1 + SHARE)) + (DEVICE_BASE if model.num_gpus else HOST_BASE)
