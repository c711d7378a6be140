"""Several Ray nodes on one machine, each with an address of its own on the loopback, and a pool on all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli.flags import OWN_RAY_FLAGS, direct_ingress_flags
from cluster.sockets import free_port
from tests.pool import environment
from tests.sockets import server_of

#: A node that is killed is missed after about 3 s, one that is cut off after 15; one that is only slow is not.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1200,
    "health_check_failure_threshold": 10,
}
#: The address of the head node; the others count on from it. Ray takes 127.0.0.1 for another one of this machine's.
FIRST = "127.0.0.2"
#: What Serve's controller and the ledger are bound to.
HEAD = "node:__internal_head__"


class Nodes:
    """The head node, and others that come and go. `port` is that of the ingress on every node."""

    def __init__(self, cluster: Any, port: int) -> None:
        self._cluster = cluster
        self._count = 2
        self.port = port
        self.head = cluster.head_node
        #: One that is there from the beginning.
        self.second: Any = None

    @property
    def address(self) -> str:
        """Where a driver connects."""
        return str(self._cluster.address)

    def add(self, gpus: int, **params: Any) -> Any:
        """A node more, known once it is there: its `node_id`, its `node_ip_address`. For the main thread only."""
        self._count += 1
        with environment(flags(self.port)):
            node = self._cluster.add_node(
                num_cpus=4,
                num_gpus=gpus,
                node_ip_address=f"127.0.0.{self._count}",
                dashboard_agent_listen_port=0,
                **params,
            )
        return node

    def kill(self, node: Any) -> None:
        """A node is gone from one moment to the next."""
        self._cluster.remove_node(node, allow_graceful=False)

    def lose_head(self) -> None:
        """The head node is gone with all that ran there, but for Ray's own store, as where it has a Redis."""
        self._cluster.head_node.kill_raylet(check_alive=False)

    def restore_head(self) -> None:
        """Another node takes the head's place."""
        from ray._private import resource_and_label_spec

        # Ray gives the resource to a node that it starts together with its store, and lets nobody else have it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resource_and_label_spec, "HEAD_NODE_RESOURCE_NAME", "node:nobody")
            self.add(0, resources={HEAD: 1.0})


def flags(port: int) -> dict[str, str]:
    """What the processes of a node are started with."""
    return OWN_RAY_FLAGS | direct_ingress_flags(port)


@contextlib.contextmanager
def several_nodes(gpus: int, host: str = FIRST) -> Iterator[Nodes]:
    """A cluster of a head node with so many logical GPUs, and Ray's files in a folder of its own; no driver yet."""
    home = tempfile.mkdtemp(prefix="sp-")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(home) / "token")
    Path(home, "token").write_text("0" * 64)
    from ray.cluster_utils import Cluster

    port = free_port()
    head = {
        "num_cpus": 4,
        "num_gpus": gpus,
        "include_dashboard": False,
        "temp_dir": home,
        "node_ip_address": host,
        "_system_config": HEALTH,
    }
    with environment(flags(port)):
        cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster, port)
    finally:
        cluster.shutdown()
        shutil.rmtree(home, ignore_errors=True)


class Stream:
    """A chat's stream through the ingress of a certain node; there is one on each, all of them on one port.

    `text` is what was read of it, `error` the event that ended it, if one did.
    """

    def __init__(self, client: httpx.AsyncClient, answer: httpx.Response) -> None:
        self.text = ""
        self.error: dict[str, Any] | None = None
        self._has_begun = asyncio.Event()
        self._task = asyncio.create_task(self._read(client, answer))

    @classmethod
    async def begin(cls, node: Any, url: str, model: str, tokens: int) -> Stream:
        """A stream of which the first word has been read; through any ingress where no node is named."""
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens, "stream": True}
        raylet = None if node is None else node.all_processes["raylet"][0].process.pid
        while True:
            client = httpx.AsyncClient(timeout=90)
            answer = await client.send(
                client.build_request("POST", f"{url}/v1/chat/completions", json=body), stream=True
            )
            if raylet is None:
                break
            _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
            server = await asyncio.to_thread(server_of, answer.url.port, port)
            if server is not None and _parent(server) == raylet:
                break
            await client.aclose()
        stream = cls(client, answer)
        async with asyncio.timeout(60):
            await stream._has_begun.wait()
        return stream

    async def ended(self) -> Stream:
        """It, once there is no more of it."""
        async with asyncio.timeout(120):
            await self._task
        return self

    async def _read(self, client: httpx.AsyncClient, answer: httpx.Response) -> None:
        try:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    self.error = event.get("error", self.error)
                    for choice in event.get("choices", ()):
                        self.text += choice["delta"].get("content") or ""
                if self.text:
                    self._has_begun.set()
        finally:
            self._has_begun.set()
            await client.aclose()


def _parent(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_text().rsplit(") ", 1)[1].split()[1])


def drain(address: str, node: str) -> None:
    """Tell Ray that a node goes in two minutes, as a cloud does; it does not go by itself."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    gone_at_ms = int((time.time() + 120) * 1000)
    accepted, why = GcsClient(address=address).drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "the cloud", gone_at_ms)
    assert accepted, why


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What a condition says once that is true."""
    deadline = time.monotonic() + timeout_s
    while not (said := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
    return said
