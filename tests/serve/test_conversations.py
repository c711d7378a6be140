"""Conversations that survive swaps and a restart of the pool, over real Serve with real weights."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pool import Pool, running_pool, smollm2

#: One device for two models of the same weights, which differ in their slots: what one saves is not the other's.
#: One thread for each, since two would wait for each other wherever the machine has other work.
SHARED = {"gguf_n_ctx": 2048, "num_gpus": 1, "idle_timeout": 0, "engine_kwargs": {"n_threads": 1}}
MODELS = {"a": smollm2(target_inflight=2, **SHARED), "b": smollm2(target_inflight=3, **SHARED)}
WORDS = ["sea", "wind", "stone", "river", "light", "house", "green", "small", "old", "bread", "road", "bird", "cloud"]


def words(count: int, seed: int = 1) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(count))


def say(pool: Pool, model: str, messages: list[dict[str, str]]) -> Any:
    """A greedy answer, whole."""
    given: Any = messages
    return pool.openai().chat.completions.create(model=model, messages=given, temperature=0, max_tokens=16)


def go_on(messages: list[dict[str, str]], answer: Any) -> list[dict[str, str]]:
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    return [*messages, said, {"role": "user", "content": "And the second one?"}]


def first_token_ms(answer: Any) -> float:
    """From the call's entry into the engine to its first token, a look for what was saved included."""
    metrics = answer.model_extra["metrics"]
    return float(metrics["engine_tokenize_ms"] + metrics["gpu_time_to_first_token_ms"])


def counted(pool: Pool, name: str, model: str) -> float:
    with pool.http() as client:
        text = client.get("/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"slotpool_{name}_total" and sample.labels == {"model": model}:
                return sample.value
    return 0.0


def memory_folder() -> Path:
    """Where this session's Ray keeps what is in memory."""
    import ray

    from cluster.home import home_of

    node: Any = ray._private.worker._global_node
    (raylet,) = (process.process.pid for process in node.all_processes["raylet"])
    return home_of(raylet).make_memory_folder()


@pytest.mark.timeout(300)
def test_a_conversation_survives_swaps_and_a_restart(port: int, tmp_path: Path):
    first = [{"role": "user", "content": f"Remember these words: {words(1450)}. What is the first one?"}]
    disk = tmp_path / "kept"
    with running_pool(port, {"models": MODELS, "kv_store_dir": str(disk)}) as pool:
        cold = say(pool, "a", first)
        second = go_on(first, cold)
        # The other model takes the device, and is never unloaded between the two turns.
        assert say(pool, "b", first).choices[0].message.content == cold.choices[0].message.content
        unswapped = say(pool, "b", second)
        again = say(pool, "a", second)
        assert again.choices[0].message.content == unswapped.choices[0].message.content
        assert again.usage.prompt_tokens > 1450
        assert again.usage.prompt_tokens_details.cached_tokens >= 0.95 * again.usage.prompt_tokens
        print("cold, restored:", first_token_ms(cold), first_token_ms(again))
        assert first_token_ms(again) <= 0.25 * first_token_ms(cold)
        assert counted(pool, "kv_restored_tokens", "a") == again.usage.prompt_tokens_details.cached_tokens
        assert counted(pool, "kv_saved_bytes", "a") > 20e6
        assert (counted(pool, "kv_store_hits", "a"), counted(pool, "kv_store_misses", "a")) == (1, 1)
        assert (counted(pool, "kv_store_hits", "b"), counted(pool, "kv_store_misses", "b")) == (0, 1)
        pool.check()
    held = memory_folder()
    assert held.stat().st_uid == os.geteuid()
    # What is in memory lives as long as this Ray; as if it had ended, too.
    shutil.rmtree(held)
    with running_pool(port, {"models": MODELS, "kv_store_dir": str(disk)}) as pool:
        later = say(pool, "a", second)
        assert later.choices[0].message.content == unswapped.choices[0].message.content
        assert later.usage.prompt_tokens_details.cached_tokens >= 0.95 * later.usage.prompt_tokens
        assert counted(pool, "kv_store_hits", "a") == 1
        pool.check()
