"""`slotpool bench`: how fast a server answers, measured from outside with a load that has bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import click
import httpx

from app.cli.loadtest.plan import LoadPlan
from app.cli.loadtest.report import PERCENTILES, report
from app.cli.loadtest.run import LoadTest, Measured
from app.cli.output import Column, Failure, Misuse, console, emit, json_option, printable, show_json, table
from app.cli.pool import Pool, pool_options
from app.loopback import is_loopback

#: Nobody needs more of a load generator that runs on one core.
MOST_REQUESTS, MOST_CLIENTS, LONGEST_S = 100_000, 1_000, 3_600


def _ms(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


COLUMNS = (
    Column("", "figure"),
    Column("MEAN", "mean", _ms, is_number=True),
    *(Column(f"P{each}", f"p{each}", _ms, is_number=True) for each in PERCENTILES),
    Column("MAX", "max", _ms, is_number=True),
)


@click.command("bench")
@click.argument("target", metavar="[URL]", required=False)
@click.option("--model", help="The model that is asked (default: the only one, or the first that is loaded).")
@click.option(
    "--requests", type=click.IntRange(1, MOST_REQUESTS), default=64, show_default=True, help="At most so many."
)
@click.option("--concurrency", type=click.IntRange(1, MOST_CLIENTS), default=8, show_default=True, help="At a time.")
@click.option(
    "--duration", type=click.FloatRange(0.1, LONGEST_S), default=120, show_default=True, help="Seconds at most."
)
@click.option("--rate", type=click.FloatRange(0.01, 10_000), help="Requests a second, at random intervals.")
@click.option("--prompt-tokens", type=click.IntRange(1, 100_000), default=64, show_default=True, help="About so many.")
@click.option("--max-tokens", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Of each answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed asks the same.")
@click.option("--yes-remote", is_flag=True, help="The server is on another machine, and I may put load on it.")
@json_option
@pool_options
def command(pool: Pool, target: str | None, yes_remote: bool, as_json: bool, model: str | None, **shape: Any) -> None:
    """Measure how fast URL answers: streams of chats, with percentiles of TTFT, TPOT and whole answers.

    Any server with OpenAI's chat route will do; without URL it is the pool. TTFT is the time to the first token, TPOT
    that of each token after it. A server on another machine needs --yes-remote, and the pool's own key is shown to the
    pool only: name another server's key with --key-file.
    """
    server = pool if target is None else pool.at(target)
    host = urlsplit(server.url).hostname or ""
    if not (is_loopback(host) or yes_remote):
        raise Misuse(f"{host} is another machine: with --yes-remote you say that you may put load on it")
    duration = shape.pop("duration")
    plan = LoadPlan(model=model or first_model(server), duration_s=duration, **shape)
    measured = _run(plan, server)
    result = report(plan, measured)
    if as_json:
        show_json(result)
    else:
        _print(result)
    if not result["served"]:
        raise Failure("no request was served")


def first_model(pool: Pool) -> str:
    """The model to ask where none is named. Raises `Failure` where there is none."""
    rows = pool.get("/v1/models").get("data") or []
    loaded = next((row for row in rows if row.get("status") == "loaded"), None)
    if not rows:
        raise Failure(f"{pool.url} offers no model")
    return str((loaded or rows[0])["id"])


def _run(plan: LoadPlan, target: Pool) -> Measured:
    """The test, with progress on the terminal. Ctrl-C ends it, and what was measured is shown."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        return asyncio.run(_measure(plan, target, lambda done: None))
    with shown.status(f"0 of {plan.requests}", spinner="dots") as status:
        return asyncio.run(_measure(plan, target, lambda done: status.update(f"{done} of {plan.requests}")))


async def _measure(plan: LoadPlan, target: Pool, tell: Callable[[int], None]) -> Measured:
    limits = httpx.Limits(max_connections=plan.concurrency, max_keepalive_connections=plan.concurrency)
    async with target.async_client(limits) as client:
        return await LoadTest(plan, client, tell).run()


def _print(result: dict[str, Any]) -> None:
    click.echo(
        printable(
            f"{result['model']}: {result['served']} of {result['requests']} requests served "
            f"in {result['wall_s']:.1f} s, {result['concurrency']} at a time: "
            f"{result['requests_per_s']:.2f} requests/s, {result['output_tokens_per_s']:.1f} tokens/s"
        )
    )
    emit(table(COLUMNS, result["figures"]))
    if result["stopped"]:
        click.echo("It was stopped before all requests were answered.")
    for reason, count in result["failures"].items():
        click.echo(printable(f"failed: {count} x {reason}"))
