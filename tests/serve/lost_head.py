"""The node of the ledger is lost and comes back, over real Serve on two nodes; run by `test_nodes.py`.

What is lost is the head node's raylet with all that runs under it: the ledger, Serve's controller, an ingress. Ray's
own store stays, as where it has a Redis, and a new raylet takes the head's place. This process is no driver, since
that would be lost, too.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import Nodes, Stream, several_nodes
from tests.pool import Pool, fake, loaded

ROOT = Path(__file__).parents[2]
MODELS = {"far": {**fake(tokens_per_s=20), "num_gpus": 1, "target_inflight": 64, "min_replicas": 1}}
DEPLOY = """
import sys
import ray
from ray.serve._private import api
from ray.serve.schema import ServeDeploySchema
from tests.serve.lost_head import MODELS
from tests.nodes import FIRST
from tests.pool import serve_document

ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, _node_ip_address=FIRST)
client = api.serve_start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])}, proxy_location="HeadOnly")
client.deploy_apps(ServeDeploySchema.model_validate(serve_document({"models": MODELS}, 2)), _blocking=True)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head node without any GPU, and one with one: the engine is there, and the ledger here."""
    with several_nodes(gpus=0) as nodes:
        nodes.second = nodes.add(gpus=1)
        yield nodes


@pytest.fixture(scope="module")
def pool(nodes: Nodes) -> Iterator[Pool]:
    from cluster.sockets import free_port

    command = [sys.executable, "-c", DEPLOY, nodes.address, str(free_port())]
    subprocess.run(command, cwd=ROOT, timeout=120, check=True)
    pool = Pool(f"http://127.0.0.1:{nodes.port}")
    pool.wait(lambda ledger: ledger["models"]["far"]["ready"] == 1, 60)
    yield pool
    pool.close()


async def test_streams_outlive_the_ledgers_node_and_the_pool_goes_on(pool: Pool, nodes: Nodes):
    before = await asyncio.to_thread(pool.ledger)
    stream = await Stream.begin(nodes.second, pool.url, "far", 300)
    await asyncio.to_thread(nodes.lose_head)
    lost = time.monotonic()
    nodes.restore_head()
    assert ((await stream.ended()).text, stream.error) == (words(300), None)
    after = await asyncio.to_thread(pool.wait, lambda ledger: ledger["epoch"] != before["epoch"], 60)
    print(f"a new life of the ledger is seen {time.monotonic() - lost:.1f} s after the last one's end")
    after = await asyncio.to_thread(pool.wait, lambda ledger: ledger["leases"] == 0 and not ledger["recovering"], 60)
    assert [row["replica"] for row in loaded(after, "far")] == [row["replica"] for row in loaded(before, "far")]
    stream = await Stream.begin(nodes.second, pool.url, "far", 5)
    assert ((await stream.ended()).text, stream.error) == (words(5), None)


def words(count: int) -> str:
    return "".join(f"far:{index} " for index in range(count))
