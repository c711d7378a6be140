"""How far one ledger goes: its real actor and the real client of an ingress, with Ray and the engines made up.

    python tests/bench/bench_scale.py [--models 1000] [--nodes 200] [--rates 500 1000 2000 5000] [--json FILE]

The actor runs in a process of its own, with so many models on nodes of eight devices each; every replica is a task
there that carries out its orders, and takes `LOAD_S` for a load. Ingresses are clients in this process, on the socket
of the ledger's process. Requests arrive at random, for models by Zipf's law, and hold their slot for 0.3 s on average.

For each rate: how many requests a second were served, the time until a lease was there (from the moment at which the
request should have been sent), what of a core the two processes took, the longest pause of the ledger's event loop, and
what a snapshot takes. This process is at its limit where it takes a whole core, and then it, not the ledger, is what
breaks. Before the first rate all models are loaded, at once: the first line tells how long that took.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster import effects
from cluster.actor import LedgerActor
from cluster.client import LedgerClient
from cluster.errors import PoolError
from cluster.ledger.specs import NodeSpec
from cluster.orders import Address, EngineState, Load, Order, Sleep, Unload
from cluster.request import Request
from tests.unit.actor.no_ray import Cluster, Handle, configuration, holder, started, turns

GPUS, SLOTS = 8, 64
INGRESSES = 8
LOAD_S, HOLD_S, TIMEOUT_S = 0.5, 0.3, 30.0
#: How much rarer each next model is: the k-th is asked for as often as k to the power of this says.
ZIPF = -0.5
#: What a person's page and Prometheus ask of the ledger, once in so many seconds.
WATCH_S = 5.0


# --- the ledger's process -------------------------------------------------------------------------------------


class Replicas:
    """What Serve and the engines do, for as many models as there are."""

    def __init__(self, actor: LedgerActor, nodes: list[str]) -> None:
        self._actor, self._nodes = actor, itertools.cycle(nodes)
        self._started: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def follow_desired(self) -> None:
        version = -1
        while True:
            version, desired = await self._actor.desired(version)
            for model, count in desired.items():
                while self._started.get(model, 0) < count:
                    number = self._started[model] = self._started.get(model, 0) + 1
                    self._run(self._replica(model, f"{model}#{number}"))

    async def _replica(self, model: str, replica: str) -> None:
        state = started(model, replica)._replace(node=next(self._nodes))
        self._run(self._actor.attach_replica(state))
        seen = 0
        while True:
            seen, order = await self._actor.orders(replica, seen)
            await self._obey(state.node, replica, order)

    async def _obey(self, node: str, replica: str, order: Order | None) -> None:
        match order:
            case Load():
                await asyncio.sleep(LOAD_S)
                engine = EngineState(Address(node, "/nowhere"), 1, None, None, order.revision, order.slots)
                await self._actor.replica_ready(replica, engine)
            case Unload() | Sleep():
                await self._actor.engine_unloaded(replica)

    def _run(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _ledger(models: int, nodes: int, folder: Path, pipe: multiprocessing.connection.Connection) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cluster = Cluster(patch)
        cluster.nodes = {name: NodeSpec(name, gpus=GPUS, cpus=64.0) for name in (f"node-{i}" for i in range(nodes))}
        patch.setattr(effects, "this_actor", lambda: ("actor", "here"))
        patch.setattr(effects, "raylet_pid", os.getpid)
        patch.setattr("cluster.actor.home_of", lambda _: type("Home", (), {"folder": folder}))
        fields = {"num_gpus": 1, "target_inflight": SLOTS}
        config = configuration(
            {f"model-{i}": fields for i in range(models)}, max_asleep=4 * models, queue_max_size=1_000_000
        )
        actor = await cluster.life(config)
        replicas = Replicas(actor, list(cluster.nodes))
        for number in range(INGRESSES):
            state = holder(config)._replace(holder=f"ingress-{number}", actor_id=f"ingress-{number}")
            cluster.park(actor.attach_holder(state))
        cluster.park(replicas.follow_desired())
        await turns()
        pipe.send((await actor.lease_address("here"), config))
        lag = cluster.park(_longest_pause(actor, pipe))
        await lag


async def _longest_pause(actor: LedgerActor, pipe: multiprocessing.connection.Connection) -> None:
    """Answer each question: since the last, the longest pause of this event loop, the longest snapshot, and the CPU."""
    worst = snapshot_s = 0.0
    watched, used = time.monotonic(), time.process_time()
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.002)
        worst = max(worst, time.monotonic() - before - 0.002)
        if time.monotonic() - watched > WATCH_S:
            began = time.monotonic()
            actor._snapshot()
            watched = time.monotonic()
            snapshot_s = max(snapshot_s, watched - began)
        if pipe.poll():
            if pipe.recv() is None:
                return
            pipe.send((worst, snapshot_s, time.process_time() - used, await actor.check()))
            worst, snapshot_s, used = 0.0, 0.0, time.process_time()


def ledger_process(models: int, nodes: int, folder: str, pipe: multiprocessing.connection.Connection) -> None:
    import logging

    logging.disable(logging.WARNING)
    asyncio.run(_ledger(models, nodes, Path(folder), pipe))


# --- the ingresses --------------------------------------------------------------------------------------------


async def play(clients: list[LedgerClient], models: int, rate: float, seconds: float, seed: int) -> dict[str, float]:
    """Requests at a rate, until the last of them is answered."""
    rng = random.Random(seed)
    names = [f"model-{i}" for i in range(models)]
    weights = list(itertools.accumulate((1 + i) ** ZIPF for i in range(models)))
    waits: list[float] = []
    refused, granted_at = 0, 0.0
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        nonlocal refused, granted_at
        client = clients[number % len(clients)]
        model = rng.choices(names, cum_weights=weights)[0]
        try:
            lease = await client.acquire(Request(f"{seed}-{number}", model, timeout_s=TIMEOUT_S))
        except PoolError:
            refused += 1
            return
        granted_at = time.perf_counter()
        waits.append(granted_at - due)
        await asyncio.sleep(rng.expovariate(1 / HOLD_S))
        client.release(lease)

    began = due = time.perf_counter()
    for number in itertools.count():
        due += rng.expovariate(rate)
        if due > began + seconds:
            break
        if (pause := due - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        task = asyncio.ensure_future(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    sent = number
    while running:
        await asyncio.wait(running)
    took = time.perf_counter() - began
    cuts = statistics.quantiles(waits, n=1000)
    return {
        "sent_per_s": sent / seconds,
        "served_per_s": len(waits) / max(seconds, granted_at - began),
        "refused": refused,
        "lease_p50_ms": cuts[499] * 1e3,
        "lease_p99_ms": cuts[989] * 1e3,
        "took_s": took,
    }


async def _first(client: LedgerClient, model: str) -> None:
    client.release(await client.acquire(Request(f"first-{model}", model, timeout_s=600.0)))


async def run(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=ledger_process, args=(arguments.models, arguments.nodes, folder, there), daemon=True)
    process.start()
    address, config = here.recv()
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "get_or_create_ledger", lambda *_: Handle(None))  # type: ignore[arg-type]
        clients = [LedgerClient(config, f"ingress-{number}") for number in range(INGRESSES)]
        links = [asyncio.ensure_future(client._link.run(address, "here")) for client in clients]
        while not all(client._link.is_open for client in clients):
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        await asyncio.gather(*(_first(clients[i % INGRESSES], f"model-{i}") for i in range(arguments.models)))
        all_loaded_s = time.perf_counter() - began
        print(f"all models loaded at once: {all_loaded_s:.1f} s")
        print("".join(f"{key:>{len(key) + 3}}" for key in COLUMNS))
        for seed, rate in enumerate(arguments.rates, 1):
            here.send("begin")
            here.recv()
            used = resource.getrusage(resource.RUSAGE_SELF)
            row = await play(clients, arguments.models, rate, arguments.seconds, seed)
            since = resource.getrusage(resource.RUSAGE_SELF)
            here.send("end")
            pause_s, snapshot_s, cpu_s, broken = here.recv()
            assert broken is None, broken
            row |= {
                "rate": rate,
                "ledger_cpu": cpu_s / row["took_s"],
                "ingress_cpu": (since.ru_utime + since.ru_stime - used.ru_utime - used.ru_stime) / row["took_s"],
                "longest_pause_ms": pause_s * 1e3,
                "snapshot_ms": snapshot_s * 1e3,
            }
            rows.append({key: round(value, 3) for key, value in row.items()})
            print("".join(f"{row[key]:>{len(key) + 3}.{1 if row[key] > 9 else 2}f}" for key in COLUMNS), flush=True)
        for task in [*links, *(each for client in clients for each in client._senders)]:
            task.cancel()
    here.send(None)
    process.join(5)
    return {"all_loaded_s": all_loaded_s, "rates": rows}


COLUMNS = (
    "rate",
    "served_per_s",
    "refused",
    "lease_p50_ms",
    "lease_p99_ms",
    "ledger_cpu",
    "ingress_cpu",
    "longest_pause_ms",
    "snapshot_ms",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[500, 1000, 2000, 5000])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.models} models, {arguments.nodes} nodes of {GPUS} devices, {SLOTS} slots a model")
    with TemporaryDirectory() as folder:
        rows = asyncio.run(run(arguments, folder))
    if arguments.json:
        figures = {"models": arguments.models, "nodes": arguments.nodes, **rows}
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
