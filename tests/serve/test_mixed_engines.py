"""One pool of one `serve_config.yaml` with every kind of engine, taking turns on one device: no stream is cut."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from deployments.host_memory import tree_mib, tree_of
from tests import ct2
from tests.contract.engine_vllm import vllm
from tests.hf_weights import has_vllm, smollm2_folder
from tests.pool import Pool, loaded, running_pool, serve_document, smollm2
from tests.unit.raylet import lives, wait_until
from tests.upstream import Upstream

NATIVE = Path(__file__).parents[1] / "commands" / "native_server.py"
TOKENS = 24


def models() -> dict[str, dict[str, Any]]:
    """One model for each engine that is installed, on the one logical device if it can be there."""
    found = {"gguf": smollm2(target_inflight=4)}
    if importlib.util.find_spec("ctranslate2") is not None:
        # It would look for a real device; as the only model that is to be resident it takes its turn as well.
        found["ct2"] = {"backend": "ct2", "model_path": str(ct2.converted()), "target_inflight": 4, "num_gpus": 0}
    if NATIVE.exists():
        options = ["--port", "${PORT}", "--model", "${MODEL_PATH}", "--parallel", "2", "--threads", "1"]
        command = [sys.executable, str(NATIVE), *options]
        weights = found["gguf"]["model_path"]
        found["server"] = {"backend": "server", "model_path": weights, "engine_kwargs": {"command": command}}
        found["server"]["target_inflight"] = 2
    if has_vllm():
        found["vllm"] = vllm(smollm2_folder(), target_inflight=4)
    return {name: {"num_gpus": 1, "load_timeout": 300, **model} for name, model in found.items()}


@pytest.fixture(scope="module")
def far() -> Iterator[Upstream]:
    with Upstream("far").listening() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def pool(port: int, far: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    path = tmp_path_factory.mktemp("mixed") / "serve_config.yaml"
    servers = [{"url": far.url, "server_type": "vllm"}]
    args = {"models": models(), "servers": servers, "capacity": 1, "max_asleep": 8}
    path.write_text(yaml.safe_dump(serve_document(args)))
    document = yaml.safe_load(path.read_text())
    with running_pool(port, document["applications"][0]["args"]) as pool:
        yield pool
        pool.check()


async def said(client: openai.AsyncOpenAI, model: str, prompt: str) -> tuple[str, str | None]:
    """What a stream says, and why it ended."""
    text, finish = "", None
    messages: Any = [{"role": "user", "content": prompt}]
    stream = await client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=TOKENS, stream=True, timeout=280
    )
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


async def test_all_engines_take_turns_and_no_stream_is_cut(pool: Pool):
    names = list(models())
    prompts = ["Write one sentence about the sea.", "Write one sentence about bread."]
    trees: dict[str, list[int]] = {}
    async with pool.async_openai() as client:
        # All at once, twice over: whoever comes last waits for all the others' turns.
        asked = [(name, prompt) for prompt in prompts for name in [*names, "far"]]
        answers = asyncio.gather(*(said(client, name, prompt) for name, prompt in asked))
        while not answers.done():
            ledger = await asyncio.to_thread(pool.ledger)
            placed = [row for name in names for row in loaded(ledger, name)]
            assert sum(row["state"] in ("READY", "DRAINING") for row in placed) <= 1, "one is resident"
            for row in placed:
                if row["pid"]:
                    trees[row["model"]] = list(tree_of(row["pid"]))
            await asyncio.sleep(0.1)
        for (name, _), (text, finish) in zip(asked, await answers, strict=True):
            assert text, name
            assert finish in ("stop", "length"), name
        ledger = await asyncio.to_thread(pool.ledger)
        assert all(ledger["models"][name]["load_s"] for name in names), "all of them were loaded"
        last = next(name for name in names if loaded(ledger, name))
        for name, pids in trees.items():
            if name != last:
                wait_until(lambda pids=pids: not any(map(lives, pids)))
        assert tree_mib(trees[last][0]) > 0
        # And one after another, each in a pool that is not its own any more.
        for name in names:
            assert (await said(client, name, prompts[0]))[0], name
