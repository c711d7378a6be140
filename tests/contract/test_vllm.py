"""What only vLLM has: its arguments, its queue, its prefix cache, and processes that it starts and must not leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cluster.config import ModelConfig
from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.engines.protocol import Call
from deployments.host_memory import held_mib, tree_of
from deployments.link import Answer, Leased, Links
from deployments.schemas import COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE
from tests.contract.engine_vllm import SMALL, vllm
from tests.contract.pool import NODE, REPLICA, Supervised
from tests.contract.said import pieces_of, text_of
from tests.hf_weights import VLLM_PYTHON, smollm2_folder
from tests.unit.engines.drive import SEA, ask
from tests.unit.raylet import lives, wait_until

ONLY = ("vllm",)


def processes(engine: Supervised) -> list[int]:
    """The engine's own and all that vLLM has started."""
    return list(tree_of(engine.pid))


def title(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def raw(engine: Supervised, path: str, body: dict[str, Any], method: str = "POST") -> tuple[int, dict[str, Any]]:
    """The answer of a route that is the engine's own, as the proxy asks for it."""
    headers = {"content-type": "application/json"}
    call = Call(path, json.dumps({"model": "m", **body}).encode(), "r", method, headers=headers)
    return await direct(engine, call)


async def direct(engine: Supervised, call: Call) -> tuple[int, dict[str, Any]]:
    """The answer to a call that nobody has leased."""
    assert engine.ledger.engine is not None
    links = Links(NODE)
    way = await links.call(engine.ledger.engine.address, Leased(REPLICA, "r", 1, 60.0, call))
    try:
        answer = Answer(way)
        await answer.begin()
        said = b"".join([chunk async for chunk in answer.chunks()])
        return answer.status, json.loads(said)
    finally:
        way.close()
        links.close()


async def test_what_was_evaluated_is_not_evaluated_again(engine: Supervised):
    prompt = "Tell me about these numbers: " + " ".join(map(str, range(100)))
    await engine.body(ask(prompt, max_tokens=1))
    usage = (await engine.body(ask(prompt, max_tokens=1)))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2


async def test_its_queue_knows_classes(engine: Supervised):
    """Beyond its slots vLLM has a queue of its own, where the class decides."""
    done: list[int] = []

    async def one(priority: int, tokens: int) -> None:
        fields = {"model": "m", "prompt": "Count.", "max_tokens": tokens, "ignore_eos": True}
        await direct(engine, Call(COMPLETIONS, fields, f"r{priority}", priority=priority))
        done.append(priority)

    running = [asyncio.create_task(one(2, 60)) for _ in range(8)]
    await asyncio.sleep(0.3)
    waiting = [asyncio.create_task(one(3, 4)) for _ in range(4)]
    await asyncio.sleep(0.1)
    waiting.append(asyncio.create_task(one(1, 4)))
    await asyncio.gather(*running, *waiting)
    assert next(each for each in done if each != 2) == 1


async def test_a_grammar_and_tools_are_vllms(engine: Supervised):
    answer = await engine.body(ask("Say yes or no.", grammar='root ::= "yes" | "no"'))
    assert text_of(answer) in ("yes", "no")


async def test_tokens_and_text(engine: Supervised):
    (text,) = {"Hello, sea"}
    plain = await engine.body({"content": text}, TOKENIZE)
    assert plain["count"] == len(plain["tokens"]) > 1
    pieces = (await engine.body({"content": text, "with_pieces": True}, TOKENIZE))["tokens"]
    assert [each["id"] for each in pieces] == plain["tokens"]
    assert (await engine.body({"tokens": plain["tokens"]}, DETOKENIZE))["content"] == text
    chat = await engine.body({"messages": ask(text)["messages"]}, TOKENIZE)
    assert chat["count"] > plain["count"]


async def test_what_the_model_does_not_do_is_said(engine: Supervised):
    with pytest.raises(InvalidRequest, match="does not serve /v1/embeddings"):
        await engine.body({"input": "x"}, EMBEDDINGS)
    with pytest.raises(UnsupportedParameter):
        await engine.body({"prompt": "x", "best_of": 3}, COMPLETIONS)
    for path in ("/scale_elastic_ep", "/invocations", "/metrics"):
        with pytest.raises(InvalidRequest, match="does not serve"):
            await raw(engine, path, {})


async def test_its_core_is_missed_when_it_dies(engine: Supervised):
    parent, *children = processes(engine)
    stream = engine.live(ask(SEA, max_tokens=400, ignore_eos=True))
    async for event in stream:
        if pieces_of([event]):
            break
    deaths = engine.ledger.told.count("engine_died")
    (core,) = [pid for pid in children if b"EngineCore" in title(pid)]
    os.kill(core, signal.SIGKILL)
    events = [event async for event in stream]
    assert "error" in events[-1]
    wait_until(lambda: not any(map(lives, [parent, *children])))
    assert engine.ledger.told.count("engine_died") >= deaths
    assert text_of(await engine.body(ask(SEA, max_tokens=4))), "and there is another"


@pytest.mark.parametrize(
    ("engine_kwargs", "reason"),
    [
        ({"max_model_length": 8}, "vLLM has no argument 'max_model_length', did you mean 'max_model_len'"),
        ({"dtype": "int3"}, "invalid choice: 'int3'"),
        ({"tool_call_parser": "nobodys"}, "nobodys"),
        ({"max_model_len": 10**6}, "max_model_len"),
    ],
)
async def test_arguments_are_checked_by_vllm_itself(engine: Supervised, engine_kwargs: dict[str, Any], reason: str):
    await engine.unload()
    said = await engine.fail_to_load(vllm(smollm2_folder(), {**SMALL, **engine_kwargs}))
    assert reason in said
    assert "/" not in said.replace("and/or", ""), "a client may read it"


SUPERVISOR = """
import asyncio, json, sys
from pathlib import Path
from cluster.home import Home
from deployments.engine_child import EngineChild

async def main(raylet, folder, python, order):
    home = Home(Path(folder), int(raylet))
    child = await EngineChild.start(python, home, {"HF_HUB_OFFLINE": "1"}, home.folder / "log")
    await child.load(json.loads(order), lambda _: None)
    print(child.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_no_process_is_left_when_all_above_it_are_killed(engine: Supervised):
    """The supervisor hangs while the engine's process is killed: nobody is there to end what vLLM has started."""
    await engine.unload()
    await asyncio.to_thread(kill_above, engine)


def kill_above(engine: Supervised) -> None:
    config = ModelConfig.model_validate(vllm(smollm2_folder())).model_dump(mode="json", by_alias=False)
    unix = str(engine.home.folder / "other")
    order = {"model": "m", "replica": "other", "config": config, "overrides": {}, "unix": unix, "host": "", "token": ""}
    arguments = [str(engine.home.raylet), str(engine.home.folder), str(VLLM_PYTHON), json.dumps(order)]
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, *arguments], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        started = list(tree_of(pid))
        assert len(started) > 2
        os.kill(supervisor.pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(lives, started)))
        supervisor.kill()


@pytest_asyncio.fixture(scope="module")
async def pooling() -> AsyncIterator[Supervised]:
    """The same weights as a model that embeds."""
    async with Supervised.running(vllm(smollm2_folder(), type="embedding")) as pool:
        yield pool


async def test_a_model_that_embeds_scores_and_reranks(engine: Supervised, pooling: Supervised):
    with contextlib.suppress(AssertionError):
        await engine.unload()
    body = await pooling.body({"input": ["the sea", "a dog"]}, EMBEDDINGS)
    assert [each["index"] for each in body["data"]] == [0, 1]
    assert len(body["data"][0]["embedding"]) == 576
    assert body["usage"]["prompt_tokens"] > 2
    packed = await pooling.body({"input": "the sea", "encoding_format": "base64"}, EMBEDDINGS)
    assert isinstance(packed["data"][0]["embedding"], str)
    status, scores = await raw(pooling, "/v1/score", {"text_1": "the sea", "text_2": ["the sea", "a dog"]})
    assert status == 200
    assert scores["data"][0]["score"] > scores["data"][1]["score"]
    status, ranked = await raw(pooling, "/v1/rerank", {"query": "the sea", "documents": ["a dog", "the sea"]})
    assert (status, ranked["results"][0]["index"]) == (200, 1)
    status, refused = await raw(pooling, "/v1/rerank", {"query": "the sea"})
    assert status == 400
    assert refused["error"]["message"]
    assert held_mib(pooling.pid) > 0
