"""A pool on nodes that are lost, join and are drained, over real Serve; run by `test_nodes.py`.

The nodes are Ray's, in one machine, each with an address of its own and logical GPUs. Each test leaves the cluster to
the next one as it says; the streams are the fake engine's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import effects
from cluster.request import Request
from tests.nodes import FIRST, Nodes, Stream, drain, several_nodes, until
from tests.pool import Pool, fake, loaded, running_pool
from tests.sockets import connections, listeners

SECOND = "127.0.0.3"
MODELS = {
    "late": {**fake(tokens_per_s=20), "num_gpus": 1, "gpu": "127.0.0.4/0"},
    "any": {**fake(tokens=2), "num_gpus": 1},
    "far": {**fake(tokens_per_s=20), "num_gpus": 1, "gpu": f"{SECOND}/1", "target_inflight": 8},
    "near": {**fake(tokens_per_s=20), "num_gpus": 1, "gpu": f"{FIRST}/0", "target_inflight": 8},
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The head node with one GPU, and one with two."""
    import ray
    from ray.serve._private import api

    from cluster.sockets import free_port

    with several_nodes(gpus=1) as nodes:
        nodes.second = nodes.add(gpus=2)
        ray.init(address=nodes.address, namespace="serve", log_to_driver=False, _node_ip_address=FIRST)
        api.serve_start(http_options={"host": "127.0.0.1", "port": free_port()}, proxy_location="HeadOnly")
        try:
            yield nodes
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def pool(nodes: Nodes) -> Iterator[Pool]:
    """With an ingress for each node, and one for a node that may come."""
    with running_pool(nodes.port, {"models": MODELS}, ingresses=3) as pool:
        yield pool
        pool.check()


def say(pool: Pool, model: str) -> None:
    answer = pool.openai().chat.completions.create(
        model=model, messages=[{"role": "user", "content": "x"}], max_tokens=2
    )
    assert answer.choices[0].message.content == words(model, 2)


def words(model: str, count: int) -> str:
    return "".join(f"{model}:{index} " for index in range(count))


def place(pool: Pool, model: str) -> tuple[str, tuple[int, ...]]:
    (row,) = loaded(pool.ledger(), model)
    return row["node"], tuple(row["devices"])


async def in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.to_thread(function, *args)


def test_models_stand_on_the_node_and_the_device_that_they_are_bound_to(pool: Pool, nodes: Nodes):
    say(pool, "far")
    assert place(pool, "far") == (nodes.second.node_id, (1,))


async def test_streams_cross_nodes_over_tcp(pool: Pool, nodes: Nodes):
    """The engine is on the second node, the head's ingress is not: its port is for such."""
    ledger = effects.find_ledger()
    grant = await ledger.acquire.remote("test", Request("probe", "far"))
    await ledger.settle.remote([("probe", grant.generation, None)])
    assert (grant.address.node, grant.address.host) == (nodes.second.node_id, SECOND)
    stream = await Stream.begin(nodes.head, pool.url, "far", 40)
    assert connections(grant.address.port) >= 1
    assert ((await stream.ended()).text, stream.error) == (words("far", 40), None)


async def test_there_is_an_ingress_on_every_node(pool: Pool, nodes: Nodes):
    await in_thread(until, lambda: len(listeners(nodes.port)) == 2)
    for node in (nodes.head, nodes.second):
        stream = await (await Stream.begin(node, pool.url, "far", 3)).ended()
        assert (stream.text, stream.error) == (words("far", 3), None)


async def test_a_node_that_is_lost_costs_its_streams_and_no_others(pool: Pool, nodes: Nodes):
    far = [await Stream.begin(nodes.head, pool.url, "far", 400) for _ in range(3)]
    near = await Stream.begin(nodes.head, pool.url, "near", 100)
    await in_thread(nodes.kill, nodes.second)
    killed = time.monotonic()
    for each in far:
        await each.ended()
        assert each.text.startswith("far:0 ")
        assert each.error is not None
        assert each.error["message"] == "the replica of far went away"
    print(f"{time.monotonic() - killed:.1f} s until the last of them heard of it")
    assert ((await near.ended()).text, near.error) == (words("near", 100), None)
    await in_thread(pool.wait, lambda ledger: [node["name"] for node in ledger["nodes"]] == [nodes.head.node_id])
    await in_thread(say, pool, "any")


async def test_a_node_joins_and_is_drained_and_no_stream_is_lost(pool: Pool, nodes: Nodes):
    """The third one has what a model is bound to; its stream runs on while nothing new may come there."""
    third = nodes.add(1)
    await in_thread(pool.wait, lambda ledger: third.node_id in {node["name"] for node in ledger["nodes"]})
    stream = await Stream.begin(nodes.head, pool.url, "late", 160)
    assert place(pool, "late") == (third.node_id, (0,))
    drain(nodes.address, third.node_id)
    await in_thread(pool.wait, lambda ledger: third.node_id not in {node["name"] for node in ledger["nodes"]})
    assert ((await stream.ended()).text, stream.error) == (words("late", 160), None)
    await in_thread(pool.wait, lambda ledger: not loaded(ledger, "late"))
