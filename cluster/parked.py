"""The calls that wait in the ledger's actor for the decision about their request."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, NamedTuple

from cluster.ledger.events import Grant, Reject

Answer = asyncio.Future[Grant | Reject]
Packed = tuple[Any, ...] | None


def packed(answer: Answer) -> Packed:
    """What is decided, as a bare tuple: Ray's pickler asks Python about every object of a class of its own, which
    costs ten times as much as the tuple in it. None is what is not decided yet.
    """
    return tuple(answer.result()) if answer.done() else None


def unpacked(decision: Packed) -> Grant | Reject | None:
    """What was packed: a grant and a refusal differ in their number of fields."""
    if decision is None:
        return None
    return Grant(*decision) if len(decision) == len(Grant._fields) else Reject(*decision)


class _Call(NamedTuple):
    holder: str
    answer: Answer
    trace: str


class ParkedCalls:
    """One answer per request id, from the request's arrival until somebody takes it or nobody wants it any more."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}

    def find(self, request: str) -> Answer | None:
        call = self._calls.get(request)
        return None if call is None else call.answer

    def park(self, request: str, holder: str, trace: str = "") -> Answer:
        answer: Answer = asyncio.get_running_loop().create_future()
        self._calls[request] = _Call(holder, answer, trace)
        return answer

    def trace_of(self, request: str) -> str:
        """What the client calls a request that waits; empty where nobody knows."""
        call = self._calls.get(request)
        return "" if call is None else call.trace

    def take(self, request: str) -> None:
        """The answer has gone to its caller."""
        self._calls.pop(request, None)

    def cancel(self, request: str) -> None:
        """Nobody wants the answer any more."""
        call = self._calls.pop(request, None)
        if call is not None:
            call.answer.cancel()

    def decide(self, answer: Grant | Reject) -> bool:
        """Answer a call; False if there is none that waits for it."""
        call = self._calls.get(answer.request)
        if call is None or call.answer.done():
            return False
        call.answer.set_result(answer)
        return True

    def cancel_all_but(self, holder: str, wanted: Collection[str]) -> None:
        """Of a holder's calls only these are still wanted."""
        unwanted = [request for request, call in self._calls.items() if call.holder == holder and request not in wanted]
        for request in unwanted:
            self.cancel(request)
