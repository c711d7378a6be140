"""The ledger's end of the way that leases take (`cluster/lease_link.py` has its frames)."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from cluster.frames import Connection, frame
from cluster.lease_link import ARRIVALS, DECISIONS, TO_LEDGER, Settled
from cluster.metrics import Outcome
from cluster.orders import Address
from cluster.parked import Answer
from cluster.sockets import Listener

logger = logging.getLogger("slotpool.ledger")

#: Takes a holder's requests and the number of its message; the answer to each, made or to come.
Arrive = Callable[[str, Sequence[Sequence[Any]], int], list[Answer]]


class LeaseServer:
    """Takes requests and releases from holders' sockets, and sends them what is decided.

    A decision that finds its connection closed stays parked: the holder asks again under the same id.
    """

    def __init__(self, arrive: Arrive, settle: Callable[[list[Settled]], None], take: Callable[[str], None]) -> None:
        """`take` is told of every decision that has gone to its holder."""
        self._arrive, self._settle, self._take = arrive, settle, take
        self._listener = Listener(TO_LEDGER, self._serve)
        self._here: Address | None = None
        # decisions about those who had to wait, until the end of this turn of the event loop
        self._decisions: dict[Connection, list[Any]] = {}
        self._turn = asyncio.Lock()

    async def address_for(self, node: str, here: str, folder: Path, host: Callable[[], str]) -> Address | None:
        """Where a holder on `node` reaches this ledger, which is on the node `here`; None where it cannot.

        `host` is this machine's address for others, asked for when the first of them wants to come. May block.
        """
        async with self._turn:
            if self._here is None:
                path = folder / f"ledger-{secrets.token_hex(4)}.sock"
                await self._listener.listen_unix(path)
                self._here = Address(here, str(path))
            if node != here and not self._here.port:
                others, token = await asyncio.to_thread(host), secrets.token_hex(16)
                if others:
                    port = await self._listener.listen_tcp(others, token)
                    self._here = self._here._replace(host=others, port=port, token=token)
            return self._here if node == here or self._here.port else None

    def stop(self) -> None:
        """Accept no more holders."""
        self._listener.stop()

    async def _serve(self, connection: Connection) -> None:
        try:
            while True:
                kind, payload = await connection.read()
                said = msgpack.unpackb(payload)
                if kind == ARRIVALS:
                    self._arrived(connection, *said)
                else:
                    self._settle(
                        [(request, generation, ended and Outcome(*ended)) for request, generation, ended in said]
                    )
        except ConnectionError:
            pass  # The holder is gone, or asks again on another connection; its death comes from Ray.
        except Exception:
            logger.exception("a holder sent what is no message; its connection is closed")
        finally:
            connection.close()

    def _arrived(self, connection: Connection, holder: str, number: int, requests: Sequence[Sequence[Any]]) -> None:
        decided = []
        for request, answer in zip(requests, self._arrive(holder, requests, number), strict=True):
            if answer.done() and not answer.cancelled():
                self._take(request[0])
                decided.append(answer.result())
            else:
                answer.add_done_callback(partial(self._decided, connection, request[0]))
        if decided:
            _send(connection, decided)

    def _decided(self, connection: Connection, request: str, answer: Answer) -> None:
        if not answer.cancelled() and not connection.is_closed:
            self._take(request)
            if connection not in self._decisions:
                self._decisions[connection] = []
                asyncio.get_running_loop().call_soon(self._send_decisions, connection)
            self._decisions[connection].append(answer.result())

    def _send_decisions(self, connection: Connection) -> None:
        """What one event, or several of one turn of the event loop, has decided goes in one write."""
        _send(connection, self._decisions.pop(connection))


def _send(connection: Connection, decisions: list[Any]) -> None:
    connection.write(frame(DECISIONS, msgpack.packb(decisions, default=str)))
