"""What a load test measured, as percentiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import ceil
from typing import Any

from app.cli.loadtest.plan import LoadPlan
from app.cli.loadtest.run import Measured

PERCENTILES = (50, 90, 99)
#: The figures of single requests, by their attribute, in the order of the table.
FIGURES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "total_s": "end to end"}


def report(plan: LoadPlan, measured: Measured) -> dict[str, Any]:
    """Everything that was measured, as plain data. A figure that nobody has is None."""
    served = [each for each in measured.samples if each.error is None]
    tokens = sum(each.output_tokens for each in served)
    rows = []
    for key, name in FIGURES.items():
        values = [value for each in served if (value := getattr(each, key)) is not None]
        rows.append({"figure": name, **percentiles(values)})
    failures = Counter(each.error for each in measured.samples if each.error is not None)
    return {
        "model": plan.model,
        "requests": len(measured.samples),
        "served": len(served),
        "failed": len(measured.samples) - len(served),
        "failures": dict(failures.most_common()),
        "stopped": measured.stopped,
        "concurrency": plan.concurrency,
        "seed": plan.seed,
        "wall_s": round(measured.wall_s, 3),
        "requests_per_s": rate(len(served), measured.wall_s),
        "output_tokens": tokens,
        "output_tokens_per_s": rate(tokens, measured.wall_s),
        "prompt_tokens": sum(each.prompt_tokens or 0 for each in served),
        "figures": rows,
    }


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """`mean`, `p50`, … `max` of some values in seconds, by the nearest rank; None of none."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(("mean", *(f"p{each}" for each in PERCENTILES), "max"))
    ranks = {f"p{each}": ordered[ceil(each / 100 * len(ordered)) - 1] for each in PERCENTILES}
    found = {"mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}
    return {name: round(value, 6) for name, value in found.items()}


def rate(count: int, wall_s: float) -> float:
    """So many a second."""
    return round(count / wall_s, 2) if wall_s > 0 else 0.0
