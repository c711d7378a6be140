"""What each principal has used of its budget, day by day, in the pool's store."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Column, Connection, Float, Integer, String, Table, delete, insert, select, update

from app.store import Store, metadata
from deployments.limits import Used

#: How many days are kept, for whoever wants to look.
KEPT_DAYS = 31

_usage = Table(
    "usage",
    metadata,
    Column("day", Integer, primary_key=True),
    Column("principal", String(64), primary_key=True),
    Column("requests", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("cost", Float, nullable=False),
)


class Usage:
    """The budgets of all ingress replicas that share a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(self, day: int, used: Mapping[str, Used]) -> dict[str, Used]:
        """As `deployments.limits.Tally` has it. Raises `BackendUnavailable` where the store does not answer."""
        return await self._store.run(lambda connection: _add(connection, day, used))


def _add(connection: Connection, day: int, used: Mapping[str, Used]) -> dict[str, Used]:
    for principal, more in used.items():
        row = (_usage.c.day == day, _usage.c.principal == principal)
        # In one statement, since other processes add to it as well.
        more_of = {name: _usage.c[name] + value for name, value in more._asdict().items()}
        if connection.execute(update(_usage).where(*row).values(more_of)).rowcount == 0:
            connection.execute(delete(_usage).where(_usage.c.day < day - KEPT_DAYS))
            connection.execute(insert(_usage).values(day=day, principal=principal, **more._asdict()))
    found = select(_usage).where(_usage.c.day == day, _usage.c.principal.in_(list(used)))
    return {row.principal: Used(row.requests, row.tokens, row.cost) for row in connection.execute(found)}
