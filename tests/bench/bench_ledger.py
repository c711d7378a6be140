"""How many events per second the pure ledger takes, and how that grows with the size of the pool.

    python tests/bench/bench_ledger.py [--json FILE] [--seconds S]

Every size is measured the same way: all replicas ready, all slots leased, a standing queue; then, over and over, a
random lease is released (its slot goes to the next in line at once) and a new request arrives to wait. One such pair
is two events and one grant. The small pool is also measured without a queue, where every arrival is granted at once.
The clock moves on with every event, so deadlines and timers do their work.

Then three large pools (1,000 models, 10,000 replicas, 100,000 requests in line) are taken through a storm of events of
every kind (`ledger_storm.py`), of which each is timed by itself. `large_p999_ms` is the worst of the three 99.9th
percentiles, `large_max_ms` the longest event of all. Not among them are what is no event (a snapshot, for people and
metrics) and what ends an eighth of everything there is (the death of an ingress, in several events, of which the
longest is told): those are told beside.

Cyclic garbage collection stays on; the
pool that stands before the measurement is frozen out of it (`gc.freeze`), as the actor may do after its start.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.ledger.events import Grant, LeaseReleased, ReplicaReady, ReplicaStarted, RequestArrived
from cluster.ledger.ledger import Ledger
from cluster.ledger.specs import ModelSpec, NodeSpec, PoolSpec
from tests.bench import ledger_storm

SLOTS = 4


def build(models: int, replicas: int) -> Ledger:
    """A ledger with all replicas of all models ready."""
    names = [f"model-{index}" for index in range(models)]
    devices = models * replicas
    spec = PoolSpec(
        models={
            name: ModelSpec(name, slots=SLOTS, num_gpus=1.0, min_replicas=replicas, max_replicas=replicas)
            for name in names
        },
        nodes={f"node-{index}": NodeSpec(f"node-{index}", gpus=8, cpus=64.0) for index in range((devices + 7) // 8)},
        queue_max_size=10_000_000,
    )
    ledger = Ledger(spec, epoch="bench", now=0.0, recovering_until=0.5)
    nodes = list(spec.nodes)
    for number, name in enumerate(names):
        for index in range(replicas):
            uid = f"{name}#{index}"
            ledger.decide(ReplicaStarted(name, uid, nodes[(number * replicas + index) // 8]), 0.0)
            ledger.decide(ReplicaReady(uid), 0.1)
    return ledger


def measure(models: int, replicas: int, queued: int, seconds: float) -> float:
    """Events per second in the steady state."""
    rng = random.Random(7)
    ledger = build(models, replicas)
    names = [f"model-{index}" for index in range(models)]
    now, number = 1.0, 0
    leases: list[tuple[str, int]] = []

    def arrive(name: str) -> None:
        nonlocal number
        number += 1
        event = RequestArrived(f"r{number}", f"ingress-{number % 4}", name, 1 + number % 3, now + 600.0)
        for command in ledger.decide(event, now):
            if isinstance(command, Grant):
                leases.append((command.request, command.generation))

    busy = SLOTS * replicas if queued else SLOTS * replicas // 2
    for name in names:
        for _ in range(busy):
            arrive(name)
    for index in range(queued):
        arrive(names[index % models])
    ledger.check()
    gc.collect()
    gc.freeze()
    targets = [rng.randrange(1 << 30) for _ in range(4096)]
    best = 0.0
    # The machine is shared: the best of three windows is the nearest to what the code costs.
    for _ in range(3):
        events = 0
        begun = time.perf_counter()
        while (took := time.perf_counter() - begun) < seconds / 3:
            for target in targets:
                now += 1e-5
                # A random lease ends: swap it with the last, so that the list stays dense.
                index = target % len(leases)
                leases[index], leases[-1] = leases[-1], leases[index]
                request, generation = leases.pop()
                for command in ledger.decide(LeaseReleased(request, generation), now):
                    if isinstance(command, Grant):
                        leases.append((command.request, command.generation))
                arrive(names[target % models])
            events += 2 * len(targets)
        best = max(best, events / took)
    ledger.check()
    gc.unfreeze()
    return best


def storms(events: int) -> dict[str, object]:
    """Every kind of large pool in motion; the figures of the worst."""
    worlds: dict[str, dict[str, object]] = {}
    for make in (ledger_storm.wide, ledger_storm.crowded, ledger_storm.capped):
        models, replicas = ledger_storm.MODELS, ledger_storm.REPLICAS
        storm = ledger_storm.Storm(make(models, replicas), replicas, ledger_storm.QUEUED)
        storm.run(events)
        worlds[make.__name__] = figures = storm.figures()
        print(f"\n{make.__name__}: built in {figures['build_s']} s, p99.9 {figures['p999_ms']} ms", flush=True)
        print(f"{'event':22} {'times':>7} {'mean ms':>9} {'max ms':>9}")
        for kind, (times, mean, longest) in storm.table().items():
            print(f"{kind:22} {times:7} {mean:9.3f} {longest:9.2f}", flush=True)
    worst = {
        f"large_{key}": max(figures[key] for figures in worlds.values())  # type: ignore[type-var]
        for key in ("p999_ms", "max_ms", "snapshot_ms", "holder_died_ms", "build_s")
    }
    return {**worst, "worlds": worlds}


def main() -> None:
    logging.disable(logging.ERROR)
    parser = argparse.ArgumentParser(description="Events per second of the pure ledger, against its size.")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--seconds", type=float, default=1.5, help="time per size")
    parser.add_argument("--events", type=int, default=30_000, help="of each storm")
    args = parser.parse_args()
    sizes = [(10, 8, 0), (10, 8, 1_000), (30, 8, 3_000), (100, 10, 10_000), (300, 10, 30_000), (1_000, 10, 100_000)]
    curve = []
    print(f"{'models':>7} {'replicas':>9} {'queued':>8} {'events/s':>10} {'us/event':>9}")
    for models, replicas, queued in sizes:
        rate = measure(models, replicas, queued, args.seconds)
        curve.append({"models": models, "replicas": models * replicas, "queued": queued, "events_per_s": round(rate)})
        print(f"{models:7d} {models * replicas:9d} {queued:8d} {rate:10,.0f} {1e6 / rate:9.2f}", flush=True)
    small, large = curve[1]["events_per_s"], curve[-1]["events_per_s"]
    print(f"small {small:,}/s, large {large:,}/s: {small / large:.2f} times the cost per event")
    storm = storms(args.events)
    print({key: value for key, value in storm.items() if key != "worlds"})
    if args.json:
        figures = {"small_events_per_s": small, "large_events_per_s": large, "curve": curve, **storm}
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
