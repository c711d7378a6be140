"""Stored responses, in one database for all ingress replicas: they outlive processes and the pool.

Everything here runs in threads of the store's own, so that a slow disk or database never stops the event loop. What a
principal has stored, nobody else can read. A store that cannot be reached costs nobody an answer: what could not be
stored is logged, and not found later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from cluster import errors
from cluster.config.store import StoreConfig

logger = logging.getLogger("slotpool.store")

T = TypeVar("T")

#: A conversation goes back over so many responses at most, and so many bytes.
MAX_CHAIN = 1000
MAX_CHAIN_BYTES = 64 * 2**20
#: Ids of items are ours, or a client's: longer ones cannot be referred to.
MAX_ID = 64
#: How often what has expired is deleted, in seconds.
CLEANING_S = 60.0
#: How long a writer waits for another one's lock on a SQLite file, in seconds.
BUSY_S = 5.0
#: The longest that anybody waits for the store, in seconds.
ANSWER_S = 10.0

metadata = MetaData()
_responses = Table(
    "responses",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("principal", String(256), nullable=False),
    Column("previous", String(64)),
    Column("saved_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("size", Integer, nullable=False),
    #: JSON: the response object, and the items that were its input.
    Column("body", Text, nullable=False),
    Column("input", Text, nullable=False),
    Index("responses_by_expiry", "expires_at"),
    Index("responses_by_age", "saved_at"),
)
#: Which response an item belongs to: clients name their items instead of sending them again.
_items = Table(
    "items",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("response", String(64), nullable=False),
    Index("items_by_response", "response"),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One response with the items that it was asked with."""

    principal: str
    response: dict[str, Any]
    input: list[dict[str, Any]] = field(default_factory=list)
    #: When it was last saved or touched, in seconds since 1970.
    saved_at: float = 0.0

    @property
    def items(self) -> list[dict[str, Any]]:
        """All items of its turn: what went in, and what came out."""
        return [*self.input, *self.response["output"]]


class Store:
    """The database of one ingress process. Opened at its first use; every method may be called from the event loop."""

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="slotpool-store")
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._cleaned_at = 0.0

    async def save(self, stored: Stored) -> bool:
        """Keep a response, or its newer state. False, and a line in the log, where that could not be done."""
        try:
            await self.run(lambda connection: self._save(connection, stored))
        except errors.BackendUnavailable as error:
            logger.error("the response %s is not stored: %s", stored.response["id"], error.message)
            return False
        return True

    async def find(self, response: str, principal: str) -> Stored | None:
        """A stored response of this principal. Raises `BackendUnavailable` where the store does not answer."""
        return await self.run(lambda connection: _find(connection, response, principal))

    async def conversation(self, response: str, principal: str) -> list[dict[str, Any]] | None:
        """All items up to the end of a response, oldest first; None if it is not there. Raises like `find`."""
        return await self.run(lambda connection: _conversation(connection, response, principal))

    async def items(self, ids: Sequence[str], principal: str) -> dict[str, dict[str, Any]]:
        """Stored items by id; those that are not there are left out. Raises like `find`."""
        return await self.run(lambda connection: _find_items(connection, ids, principal))

    async def touch(self, response: str) -> None:
        """Say of a response that runs that it still does. Raises like `find`."""
        known = update(_responses).where(_responses.c.id == response)
        await self.run(lambda connection: connection.execute(known.values(saved_at=time.time())))

    async def delete(self, response: str, principal: str) -> bool:
        """Whether there was one to delete. Raises like `find`."""
        return await self.run(lambda connection: _delete(connection, response, principal))

    def close(self) -> None:
        """Let go of the database. Waits for what is under way."""
        self._threads.shutdown()
        if self._engine is not None:
            self._engine.dispose()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Whatever `work` does in one transaction, in a thread. Raises like `find`."""

        def locked() -> T:
            try:
                with self._open().begin() as connection:
                    return work(connection)
            except (SQLAlchemyError, OSError, LookupError, ImportError) as error:
                # The text of a driver's error may hold the URL's password.
                logger.error("the store failed: %s", type(error).__name__, exc_info=True)
                raise _unreachable() from None

        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, locked)
        except TimeoutError:
            raise _unreachable() from None

    def _open(self) -> Engine:
        with self._lock:
            if self._engine is None:
                try:
                    self._engine = _connect(self._config.resolved_url())
                except SQLAlchemyError:
                    # Another process makes the tables of a new database at the same time.
                    time.sleep(0.2)
                    self._engine = _connect(self._config.resolved_url())
            return self._engine

    def _save(self, connection: Connection, stored: Stored) -> None:
        now = time.time()
        response = stored.response
        # In ASCII: neither half a surrogate pair nor a NUL may reach a database as it is.
        body, given = json.dumps(response), json.dumps(stored.input)
        values = {
            "principal": stored.principal,
            "previous": response.get("previous_response_id"),
            "saved_at": now,
            "expires_at": now + self._config.keep_s,
            "size": len(body) + len(given),
            "body": body,
            "input": given,
        }
        known = connection.execute(update(_responses).where(_responses.c.id == response["id"]).values(values))
        if known.rowcount == 0:
            connection.execute(insert(_responses).values(id=response["id"], **values))
        else:
            connection.execute(delete(_items).where(_items.c.response == response["id"]))
        ids = {item["id"] for item in stored.items if _is_id(item.get("id"))}
        taken = set(connection.scalars(select(_items.c.id).where(_items.c.id.in_(ids)))) if ids else set()
        if ids - taken:
            connection.execute(insert(_items), [{"id": each, "response": response["id"]} for each in ids - taken])
        if now - self._cleaned_at > CLEANING_S:
            self._cleaned_at = now
            self._clean(connection, now)

    def _clean(self, connection: Connection, now: float) -> None:
        """Delete what has expired, and the oldest beyond the bound."""
        gone = list(connection.scalars(select(_responses.c.id).where(_responses.c.expires_at < now)))
        total = connection.scalar(select(func.sum(_responses.c.size)).where(_responses.c.expires_at >= now)) or 0
        excess = total - self._config.max_mb * 2**20
        if excess > 0:
            oldest = select(_responses.c.id, _responses.c.size).where(_responses.c.expires_at >= now)
            for row in connection.execute(oldest.order_by(_responses.c.saved_at)):
                if excess <= 0:
                    break
                gone.append(row.id)
                excess -= row.size
        for part in _parts(gone, 500):
            connection.execute(delete(_items).where(_items.c.response.in_(part)))
            connection.execute(delete(_responses).where(_responses.c.id.in_(part)))


def _unreachable() -> errors.BackendUnavailable:
    return errors.BackendUnavailable("the store of responses does not answer", code="store_unavailable", retry_after=1)


def _connect(url: str) -> Engine:
    """A new connection pool, with the tables made where they are not there."""
    if not url.startswith("sqlite"):
        engine = create_engine(url, pool_pre_ping=True)
    else:
        engine = create_engine(url, connect_args={"timeout": BUSY_S})

        @event.listens_for(engine, "connect")
        def _on_connect(connection: Any, _: Any) -> None:
            # Readers do not wait for the writer, and a commit costs no flush of the disk: a crash of the machine may
            # lose the last responses, never the file.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

    metadata.create_all(engine)
    return engine


def _is_id(value: Any) -> bool:
    """Whether this may be an id: no database need be asked for anything else, and not every one could be."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID and value.isascii() and value.isprintable()


def _row(connection: Connection, response: str, principal: str) -> Any:
    if not _is_id(response):
        return None
    wanted = (_responses.c.id == response, _responses.c.principal == principal, _responses.c.expires_at >= time.time())
    return connection.execute(select(_responses).where(*wanted)).one_or_none()


def _find(connection: Connection, response: str, principal: str) -> Stored | None:
    row = _row(connection, response, principal)
    return None if row is None else Stored(row.principal, json.loads(row.body), json.loads(row.input), row.saved_at)


def _conversation(connection: Connection, response: str, principal: str) -> list[dict[str, Any]] | None:
    turns: list[list[dict[str, Any]]] = []
    size, current = 0, response
    while current is not None:
        row = _row(connection, current, principal)
        if row is None:
            # An older one that is gone takes what was before it with it.
            break
        size += row.size
        if len(turns) >= MAX_CHAIN or size > MAX_CHAIN_BYTES:
            raise errors.InvalidRequest("the conversation is too long", param="previous_response_id")
        turns.append([*json.loads(row.input), *json.loads(row.body)["output"]])
        current = row.previous
    return [item for turn in reversed(turns) for item in turn] if turns else None


def _find_items(connection: Connection, ids: Sequence[str], principal: str) -> dict[str, dict[str, Any]]:
    wanted = {each for each in ids if _is_id(each)}
    found: dict[str, dict[str, Any]] = {}
    for part in _parts(list(wanted), 500):
        owners = set(connection.scalars(select(_items.c.response).where(_items.c.id.in_(part))))
        for owner in owners:
            stored = _find(connection, owner, principal)
            for item in stored.items if stored is not None else ():
                if item.get("id") in wanted:
                    found[item["id"]] = item
    return found


def _delete(connection: Connection, response: str, principal: str) -> bool:
    if not _is_id(response):
        return False
    wanted = (_responses.c.id == response, _responses.c.principal == principal, _responses.c.expires_at >= time.time())
    if connection.execute(delete(_responses).where(*wanted)).rowcount == 0:
        return False
    connection.execute(delete(_items).where(_items.c.response == response))
    return True


def _parts(values: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (values[first : first + size] for first in range(0, len(values), size))
