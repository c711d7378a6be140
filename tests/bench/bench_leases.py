"""Leases per second through the ledger actor over real Ray, as an ingress takes and returns them.

    python tests/bench/bench_leases.py [--leases 2000] [--json FILE]

`socket` is how an ingress does it: `LedgerClient` on the socket of the ledger's process (`stay_linked`). `batched` is
the same client without it, through Ray's actor calls: what arrives during one round trip goes in the next one. `one by
one` is such a call of its own for every lease and every release. In turn, in one run, at several numbers of clients at
once. The figures of the JSON file are those with 64 clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster import effects
from cluster.client import LedgerClient
from cluster.config import load_config
from cluster.config.version import Configuration
from cluster.request import Request
from tests.pool import fake, local_serve, running_pool

MODELS = {"m": {**fake(), "target_inflight": 256, "min_replicas": 1}}
CLIENTS = (1, 8, 64, 256)

#: Takes one lease under the given id and gives it back.
Cycle = Callable[[str], Awaitable[None]]


def batched(client: LedgerClient) -> Cycle:
    async def cycle(request: str) -> None:
        client.release(await client.acquire(Request(request, "m", timeout_s=60.0)))

    return cycle


def one_by_one(actor: Any) -> Cycle:
    async def cycle(request: str) -> None:
        lease = await actor.acquire.remote("bench", Request(request, "m", timeout_s=60.0))
        actor.settle.remote([(request, lease.generation, None)])

    return cycle


async def rate(cycle: Cycle, name: str, clients: int, leases: int) -> float:
    left = iter(range(leases))

    async def client() -> None:
        for number in left:
            await cycle(f"{name}-{clients}-{number}")

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return leases / (time.perf_counter() - started)


async def linked(configuration: Configuration) -> tuple[LedgerClient, asyncio.Task[None]]:
    """A client that has its socket, and what keeps it."""
    client = LedgerClient(configuration, "bench on a socket")
    linking = asyncio.create_task(client.stay_linked(ray.get_runtime_context().get_node_id()))
    async with asyncio.timeout(30):
        while not client._link.is_open:
            await asyncio.sleep(0.01)
    return client, linking


async def compare(leases: int) -> dict[str, dict[int, float]]:
    configuration = Configuration((0.0, 0), load_config({"models": MODELS}, environ={}))
    client = LedgerClient(configuration, "bench")
    on_socket, linking = await linked(configuration)
    cycles = {
        "one by one": one_by_one(effects.find_ledger()),
        "batched": batched(client),
        "socket": batched(on_socket),
    }
    rates: dict[str, dict[int, float]] = {name: {} for name in cycles}
    print(f"{'clients':<10}" + "".join(f"{name + ' /s':>16}" for name in cycles))
    for clients in CLIENTS:
        for name, cycle in cycles.items():
            await rate(cycle, f"warm {name}", clients, 100)
            rates[name][clients] = await rate(cycle, name, clients, leases)
        print(f"{clients:<10}" + "".join(f"{rates[name][clients]:>16.0f}" for name in cycles), flush=True)
    assert on_socket._link.is_open, "the socket broke"
    linking.cancel()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leases", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with local_serve() as port, running_pool(port, {"models": MODELS}):
        rates = asyncio.run(compare(arguments.leases))
    figures = {
        "socket_leases_per_s": rates["socket"][64],
        "leases_per_s": rates["batched"][64],
        "one_by_one_leases_per_s": rates["one by one"][64],
    }
    for name, value in figures.items():
        print(f"{name} = {value:.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "table": rates}, indent=1))


if __name__ == "__main__":
    main()
