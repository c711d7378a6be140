"""LoRA adapters over real weights: what they change, and what is said of one that does not fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import LlamaCppModel
from cluster.errors import ModelUnavailable
from deployments.engines.llama_cpp.conversations import fingerprint
from deployments.engines.llama_cpp.engine import LlamaCppEngine
from deployments.engines.registry import build_engine
from tests.unit.engines.drive import ask, text

#: The width of SmolLM2-135M, and an adapter's rank.
WIDTH, RANK = 576, 4


def make_adapter(path: Path, architecture: str = "llama") -> str:
    """An adapter with much noise for the queries of the first layer."""
    gguf = pytest.importorskip("gguf")
    noise = np.random.default_rng(1)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for name, shape in (("a", (RANK, WIDTH)), ("b", (WIDTH, RANK))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{name}", noise.normal(scale=10, size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@asynccontextmanager
async def loaded(weights: str, *lora: Any) -> AsyncIterator[LlamaCppEngine]:
    """The engine of a configured model."""
    model = LlamaCppModel(
        model_path=weights, gguf_n_ctx=256, target_inflight=1, gguf_lora=lora, engine_kwargs={"n_threads": 1}
    )
    engine = build_engine("smollm2", model, weights)
    assert isinstance(engine, LlamaCppEngine)
    await engine.load(lambda _: None)
    try:
        yield engine
    finally:
        await engine.unload()


async def test_an_adapter_changes_the_answer_by_its_scale(smollm2: str, tmp_path: Path):
    adapter = make_adapter(tmp_path / "noise.gguf")
    texts, prints = [], []
    for lora in ((), (adapter,), ({"path": adapter, "scale": 0.0},), (adapter, {"path": adapter, "scale": 0.5})):
        async with loaded(smollm2, *lora) as engine:
            texts.append(await text(engine, ask("Write one sentence about the sea.", max_tokens=12)))
            assert engine._runtime is not None
            prints.append(fingerprint(engine._runtime, engine._options))
    plain, noisy, none, _ = texts
    assert noisy != plain
    assert none == plain
    assert len(set(prints)) == 4, "what one of them saves is not for another"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: str(path), "there is no model file 'bad.gguf'"),
        (lambda path: str(path.write_bytes(b"no adapter") and path), "could not use the adapter bad.gguf"),
        (lambda path: make_adapter(path, "gemma3"), "could not use the adapter bad.gguf.*mismatch"),
    ],
)
async def test_an_adapter_that_does_not_fit_fails_the_load(smollm2: str, tmp_path: Path, make: Any, reason: str):
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        async with loaded(smollm2, make(tmp_path / "bad.gguf")):
            pass
    assert str(tmp_path) not in str(caught.value)
