"""A pool on two machines as the kernel has them: the second node is in a network namespace, and its cable can be cut.

What the loopback cannot show is a machine that is gone without a word: no connection ends, nothing is refused. Run by
`make test-cluster`; needs root and `ip` (iproute2), and is skipped without.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.nodes import Nodes, flags, several_nodes, until
from tests.pool import Pool, environment, fake, loaded, running_pool

ROOT = Path(__file__).parents[2]
NAME = f"sp{os.getpid() % 100_000}"
#: A range for documentation (RFC 5737), which no network of this machine should have.
HERE, THERE = "198.51.100.1", "198.51.100.2"
MODELS = {
    "far": {**fake(tokens_per_s=20), "num_gpus": 1, "gpu": f"{THERE}/0", "target_inflight": 8},
    "near": {**fake(tokens_per_s=20), "num_gpus": 1, "gpu": f"{HERE}/0", "target_inflight": 8},
    "any": {**fake(tokens_per_s=20), "num_gpus": 1},
}
CLIENT = """
import json, sys, httpx
answer = httpx.post(sys.argv[1] + "/v1/chat/completions", json=json.loads(sys.argv[2]), timeout=60)
print(answer.json()["choices"][0]["message"]["content"])
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    """A namespace with an address of its own, a cable's length away."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`")
    try:
        ip("netns", "add", NAME)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace may be made: {error.stderr.strip()}")
    try:
        ip("link", "add", NAME, "type", "veth", "peer", "name", "eth0", "netns", NAME)
        ip("address", "add", f"{HERE}/30", "dev", NAME)
        ip("link", "set", NAME, "up")
        for command in (f"address add {THERE}/30 dev eth0", "link set eth0 up", "link set lo up"):
            ip("-n", NAME, *command.split())
        yield
    finally:
        ip("netns", "delete", NAME)


@pytest.fixture(scope="module")
def nodes(cable: None) -> Iterator[Nodes]:
    import ray
    from ray.serve._private import api

    from cluster.sockets import free_port

    with several_nodes(gpus=1, host=HERE) as nodes:
        command = ["ip", "netns", "exec", NAME, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--address={nodes.address}", f"--node-ip-address={THERE}", "--num-gpus=1", "--num-cpus=4"]
        with environment(flags(nodes.port)):
            second = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ray.init(address=nodes.address, namespace="serve", log_to_driver=False, _node_ip_address=HERE)
            until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
            api.serve_start(http_options={"host": "127.0.0.1", "port": free_port()}, proxy_location="HeadOnly")
            yield nodes
        finally:
            ray.shutdown()
            second.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                second.wait(20)
            second.kill()


@pytest.fixture(scope="module")
def pool(nodes: Nodes) -> Iterator[Pool]:
    with running_pool(nodes.port, {"models": MODELS}, ingresses=2) as pool:
        yield pool
        pool.check()


def chat(model: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens}


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


async def read(pool: Pool, model: str, tokens: int, begun: asyncio.Event) -> tuple[str, openai.APIError | None]:
    """A stream's text, and how it failed if it did."""
    text = ""
    async with pool.async_openai() as client:
        try:
            async for chunk in await client.chat.completions.create(**chat(model, tokens), stream=True):
                text += chunk.choices[0].delta.content or ""
                if text:
                    begun.set()
        except openai.APIError as error:
            return text, error
        finally:
            begun.set()
    return text, None


def test_each_node_has_its_ingress_and_reaches_the_others_engines(pool: Pool, nodes: Nodes):
    """Each listens on its own loopback, so which one answers is certain."""
    for model in ("near", "far"):
        assert pool.openai().chat.completions.create(**chat(model, 5)).choices[0].message.content == words(model, 5)

    def asked_there(model: str) -> bool:
        command = ["ip", "netns", "exec", NAME, sys.executable, "-c", CLIENT, pool.url, json.dumps(chat(model, 5))]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
        return said.stdout.strip() == words(model, 5).strip()

    # The second ingress may still be on its way.
    until(lambda: asked_there("near"))
    assert asked_there("far")


async def test_a_node_that_is_cut_off_costs_its_streams_and_no_others(pool: Pool):
    begun = [asyncio.Event(), asyncio.Event()]
    near = asyncio.create_task(read(pool, "near", 800, begun[0]))
    far = asyncio.create_task(read(pool, "far", 4000, begun[1]))
    async with asyncio.timeout(60):
        await asyncio.gather(*(each.wait() for each in begun))
    await asyncio.to_thread(ip, "link", "set", NAME, "down")
    cut = time.monotonic()
    async with asyncio.timeout(60):
        text, failure = await far
    print(f"its client heard after {time.monotonic() - cut:.1f} s")
    assert text.startswith(words("far", 1))
    assert isinstance(failure, openai.APIError)
    assert await near == (words("near", 800), None)
    ledger = await asyncio.to_thread(pool.wait, lambda ledger: len(ledger["nodes"]) == 1, 60)
    assert loaded(ledger, "far") == []
    begun[0].clear()
    assert await read(pool, "any", 5, begun[0]) == (words("any", 5), None)
    await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0)
