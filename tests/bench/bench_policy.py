"""What the scheduling policy is worth: twelve traces on a virtual clock, each on the same simulated cluster.

    python tests/bench/bench_policy.py [--json FILE] [--seed N] [--seeds COUNT] [--trace NAME]

fifo         one line for all; whoever is first gets its model loaded, and nobody overtakes ("swap on demand").
ready_first  whoever's model is loaded goes first, without any bound; a model is swapped out when nobody uses or
             wants it any more, for the longest waiting.
slotpool     the real ledger with its default parameters.
achievable   a schedule made by a search that knows all arrivals and service times beforehand, and carried out in the
             same cluster (`policy/search.py`). It shows how far there is to go; nobody who does not know the future
             gets there.
lower_bound  no schedule at all: each model has the whole cluster for itself, and is loaded in time.

With several seeds the figures are those of the first, and the spread of the ratios is said besides.

`late` counts the requests that waited longer than the bound of their own class. `achievable_ratio` is slotpool's mean
wait over that of `achievable`. What any of them did is checked by `policy/validate.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.ledger.ledger import Ledger
from tests.bench.policy.planned import Planned
from tests.bench.policy.play import Played, lower_bound, play
from tests.bench.policy.rivals import Fifo, ReadyFirst
from tests.bench.policy.search import Search
from tests.bench.policy.traces import TRACES, Trace
from tests.bench.policy.validate import Recorder, faults


def measure(trace: Trace) -> dict[str, Any]:
    spec = trace.spec()
    chains = Search(trace).run()
    played = {
        "fifo": play(trace, lambda now: Fifo(spec)),
        "ready_first": play(trace, lambda now: ReadyFirst(spec)),
        "slotpool": play(trace, lambda now: Ledger(spec, epoch="bench", now=now)),
        "achievable": play(trace, lambda now: Planned(spec, chains)),
    }
    for name, each in played.items():
        check(name, each)
    policies = {name: each.figures() for name, each in played.items()} | {"lower_bound": lower_bound(trace)}
    return {
        "name": trace.name,
        "bound_s": max(trace.bound_s(model, priority) for model, priority, _ in trace.asked),
        "contended": trace.contended,
        "achievable_ratio": round(policies["slotpool"]["mean_wait_s"] / policies["achievable"]["mean_wait_s"], 3),
        "policies": policies,
    }


def check(name: str, played: Played) -> None:
    assert isinstance(played.world, Recorder)
    wrong = faults(played.trace, played.world.log)
    assert not wrong, f"{name} on {played.trace.name}: {wrong[:3]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Swaps and waits of five schedulers over simulated traces.")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="so many seeds, for the spread of the ratio")
    parser.add_argument("--trace", help="run this one only")
    args = parser.parse_args()
    rows = []
    print(f"{'trace':18} {'policy':12} {'mean':>8} {'p95':>8} {'max':>8} {'swaps':>6} {'makespan':>9}   (bound)  late")
    for make in TRACES:
        trace = make(random.Random(args.seed))
        if args.trace not in (None, trace.name):
            continue
        row = measure(trace)
        rows.append(row)
        others = [measure(make(random.Random(seed))) for seed in range(args.seed + 1, args.seed + args.seeds)]
        ratios = sorted(each["achievable_ratio"] for each in [row, *others])
        row["achievable_ratios"] = ratios
        for name, figure in row["policies"].items():
            waits = f"{figure['mean_wait_s']:8.2f} {figure['p95_wait_s']:8.2f} {figure['max_wait_s']:8.2f}"
            rest = f"{figure['swaps']:6d} {figure['makespan_s']:9.1f}   ({row['bound_s']:g})"
            ratio = f"  {row['achievable_ratio']:.2f} x achievable" if name == "slotpool" else ""
            if ratio and others:
                ratio += f" ({ratios[0]:.2f} to {ratios[-1]:.2f} over {args.seeds} seeds)"
            print(f"{trace.name:18} {name:12} {waits} {rest} {figure['late']:5d}{ratio}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"traces": rows}, indent=1))


if __name__ == "__main__":
    main()
