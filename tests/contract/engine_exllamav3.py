"""ExLlamaV3 with SmolLM2's plain weights, where the library and a GPU are there. Without them
`tests/unit/engines/test_exllamav3.py` holds the engine against the library's documented interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.contract.entry import Entry
from tests.contract.pool import SLOTS
from tests.hf_weights import FOLDER, has_vllm, smollm2_folder


def exllamav3(path: Path, **fields: Any) -> dict[str, Any]:
    """A model of ExLlamaV3's."""
    kwargs = {"n_ctx": 1024}
    model = {"backend": "exllamav3", "model_path": str(path), "format": "hf", "num_gpus": 1, "target_inflight": SLOTS}
    return {**model, "exllama_cache_size": 1024 * SLOTS, "engine_kwargs": kwargs, **fields}


def has_gpu_and_weights() -> bool:
    # They are converted by vLLM's environment.
    from cluster.gpus import read_gpus

    return bool(read_gpus()[0]) and (FOLDER.exists() or has_vllm())


def broken(folder: Path) -> dict[str, Any]:
    path = folder / "broken"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["NobodysModel"]}')
    (path / "tokenizer.json").write_text("{}")
    return exllamav3(path)


EXLLAMAV3 = Entry(
    "exllamav3",
    ("exllamav3", "torch", "tokenizers"),
    lambda folder: exllamav3(smollm2_folder()),
    broken,
    on_gpu=True,
    is_there=has_gpu_and_weights,
)
