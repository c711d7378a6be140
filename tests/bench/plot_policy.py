"""Draws the pictures of `docs/scheduling.md` from simulated traces.

    python tests/bench/bench_policy.py --json FILE && python tests/bench/plot_policy.py FILE [--out docs]

waits   mean wait of every trace under each policy, from FILE.
turns   who holds the device, and who waits, while a crowd comes to each of two models.
knobs   what a longer bound, and a longer minimum turn, do to mean and worst wait.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from cluster.ledger.events import Grant, ReplicaGone, ReplicaReady, RequestArrived
from cluster.ledger.ledger import Ledger
from tests.bench.policy.planned import Planned
from tests.bench.policy.play import Played, play
from tests.bench.policy.rivals import ReadyFirst
from tests.bench.policy.search import Search
from tests.bench.policy.traces import Trace, agent, burst_then_calm, five_visitors
from tests.bench.policy.validate import Recorder

COLORS = {"fifo": "#b8b8b8", "ready_first": "#e0a030", "slotpool": "#1f6fb2", "achievable": "#3a9a5b"}
SEEDS = (1, 2, 3)

# The crowd of `burst-then-calm` comes at 150 s.
SHOWN = (100.0, 500.0)


def waits(rows: list[dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 5))
    rows = [row for row in rows if row["contended"]]
    for offset, (name, color) in enumerate(COLORS.items()):
        heights = [row["policies"][name]["mean_wait_s"] for row in rows]
        axes.barh([i + 0.2 * offset for i in range(len(rows))], heights, 0.2, color=color, label=name)
    axes.set_yticks([i + 0.3 for i in range(len(rows))], [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("mean wait, s")
    axes.legend()
    return figure


def turns() -> plt.Figure:
    """Above, the device's stripes by policy; below, how many wait for either model with ours."""
    trace = burst_then_calm(random.Random(1))
    spec, chains = trace.spec(), Search(trace).run()
    played = {
        "ready_first": play(trace, lambda now: ReadyFirst(spec)),
        "slotpool": play(trace, lambda now: Ledger(spec, epoch="plot", now=now)),
        "achievable": play(trace, lambda now: Planned(spec, chains)),
    }
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    shades = {"A": "#1f6fb2", "B": "#e0a030"}
    for row, each in enumerate(played.values()):
        for model, begin, end in stays(each):
            above.broken_barh([(begin, end - begin)], (row - 0.4, 0.8), color=shades[model])
    above.set_yticks(range(len(played)), list(played))
    above.invert_yaxis()
    above.set_title("which model is loaded (blue A, orange B; white: drain, stop and load)", fontsize=10)
    for model in trace.load_s:
        times, counts = waiting(played["slotpool"], model)
        below.step(times, counts, where="post", color=shades[model], label=f"waiting for {model}, slotpool")
    below.set_xlim(*SHOWN)
    below.set_xlabel("s")
    below.legend()
    return figure


def stays(played: Played) -> list[tuple[str, float, float]]:
    """When each replica could serve: from its load until its stop."""
    assert isinstance(played.world, Recorder)
    begun: dict[str, float] = {}
    found = []
    for now, said in played.world.log:
        if isinstance(said, ReplicaReady):
            begun[said.replica] = now
        elif isinstance(said, ReplicaGone):
            found.append((said.replica.split("#")[0], begun.pop(said.replica), now))
    return found + [(replica.split("#")[0], begin, played.world.now) for replica, begin in begun.items()]


def waiting(played: Played, model: str) -> tuple[list[float], list[int]]:
    assert isinstance(played.world, Recorder)
    times, counts = [0.0], [0]
    for now, said in played.world.log:
        step = 1 if isinstance(said, RequestArrived) else -1 if isinstance(said, Grant) else 0
        if step and said.model == model:
            times.append(now)
            counts.append(counts[-1] + step)
    shown = [index for index, when in enumerate(times) if SHOWN[0] <= when <= SHOWN[1]]
    return [times[index] for index in shown], [counts[index] for index in shown]


def knobs() -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6))
    bounds = [3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0]
    sweep(left, five_visitors, bounds, [{"bound_s": (each, each, each)} for each in bounds])
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("bound_s (max_wait_s), s")
    left.set_title("five-visitors", fontsize=10)
    lengths = [0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0]
    sweep(right, agent, lengths, [{"turn_swaps": each} for each in lengths])
    right.set_xlabel("turn_swaps")
    right.set_yscale("log")
    right.set_title("agent-and-batch", fontsize=10)
    left.set_ylabel("s")
    return figure


def sweep(axes: Axes, make: object, xs: list[float], settings: list[dict]) -> None:
    means, worst = [], []
    for more in settings:
        figures = [of(make(random.Random(seed)), more).figures() for seed in SEEDS]  # type: ignore[operator]
        means.append(mean(each["mean_wait_s"] for each in figures))
        worst.append(mean(each["max_wait_s"] for each in figures))
    axes.plot(xs, worst, "o-", color="#b03030", label="worst wait")
    axes.plot(xs, means, "o-", color="#1f6fb2", label="mean wait")
    axes.legend()


def of(trace: Trace, more: dict) -> Played:
    spec = replace(trace.spec(), **more)
    return play(trace, lambda now: Ledger(spec, epoch="plot", now=now))


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of docs/scheduling.md.")
    parser.add_argument("json", help="what bench_policy.py --json has written")
    parser.add_argument("--out", default="docs", help="the folder for the pictures")
    args = parser.parse_args()
    # The same figures give the same bytes.
    plt.rcParams["svg.hashsalt"] = "slotpool"
    pictures = {"waits": waits(json.loads(Path(args.json).read_text())["traces"]), "turns": turns(), "knobs": knobs()}
    for name, figure in pictures.items():
        path = Path(args.out) / f"scheduling-{name}.svg"
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        # Matplotlib leaves blanks at the ends of lines.
        path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
        print(f"{path}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
