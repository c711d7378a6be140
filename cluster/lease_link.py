"""The holder's end of the way that leases take: a socket of the ledger's process, and frames of msgpack.

    b  arrivals: the holder, the number of its message, and requests
    s  what is given back: request, generation and outcome of each
    d  decisions: grants and refusals, each as soon as it is made

Ray's calls of an actor pass through several threads of both processes, which costs the two of them 5 ms of CPU for a
lease and its release, and 3 ms until it is there; a socket between their event loops costs a tenth
(`docs/measurements.md`). What a connection loses is asked for again, or reconciled, as after a ledger's death.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import msgpack

from cluster.frames import Connection, ConnectionEnded, frame
from cluster.ledger.events import Grant, Reject
from cluster.metrics import Outcome
from cluster.orders import Address
from cluster.parked import unpacked
from cluster.request import Request
from cluster.sockets import connect

ARRIVALS, SETTLED, DECISIONS = b"b", b"s", b"d"

#: The largest payloads, in bytes: thousands of requests, with their addresses on the way back.
TO_LEDGER = {ARRIVALS: 2**24, SETTLED: 2**24}
TO_HOLDER = {DECISIONS: 2**24}

Settled = tuple[str, int | None, Outcome | None]


def decision_of(fields: list[Any]) -> Grant | Reject | None:
    """A decision again: msgpack knows lists only."""
    if len(fields) != len(Grant._fields):
        return unpacked(tuple(fields))
    request, holder, model, replica, slots, generation, queued, loading, address, devices = fields
    found = address and _address(*address)
    return Grant(request, holder, model, replica, tuple(slots), generation, queued, loading, found, tuple(devices))


@lru_cache(maxsize=1024)
def _address(*fields: Any) -> Address:
    """One object for all leases of an engine."""
    return Address(*fields)


class LeaseLink:
    """One connection to the present life of the ledger. Between two of them it is closed, and nothing may be sent."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._asked: dict[str, asyncio.Future[Grant | Reject | None]] = {}

    @property
    def is_open(self) -> bool:
        return self._connection is not None and not self._connection.is_closed

    def ask(self, holder: str, number: int, asked: Iterable[tuple[Request, asyncio.Future[Any]]]) -> None:
        """Send requests. Each one's future gets its decision, or `ConnectionEnded`."""
        requests = []
        for request, answer in asked:
            self._asked[request.id] = answer
            requests.append(request)
        self._send(ARRIVALS, [holder, number, requests])

    def forget(self, request: str) -> None:
        """Nobody waits for this decision any more."""
        self._asked.pop(request, None)

    def settle(self, settled: list[Settled]) -> None:
        """Send what is given back."""
        self._send(SETTLED, settled)

    async def run(self, address: Address, node: str) -> None:
        """Connect from a process on `node`, and take decisions in. Raises `OSError` when the connection ends."""
        self._connection = await connect(address, node, TO_HOLDER)
        try:
            while True:
                _, payload = await self._connection.read()
                for fields in msgpack.unpackb(payload):
                    answer = self._asked.pop(fields[0], None)
                    if answer is not None and not answer.done():
                        answer.set_result(decision_of(fields))
        finally:
            self._connection.close()
            lost, self._asked = self._asked, {}
            for answer in lost.values():
                if not answer.done():
                    answer.set_exception(ConnectionEnded("the ledger is gone"))

    def _send(self, kind: bytes, content: Any) -> None:
        assert self._connection is not None, "it is open"
        self._connection.write(frame(kind, msgpack.packb(content)))
