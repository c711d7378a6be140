"""Operators' calls that wait for a model to be loaded or gone: parked, and looked at after every event.

Nothing is polled: a call ends in the same step in which the ledger learns what it waits for. An operator who hangs up
leaves the model to its fate; the load or unload goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

from cluster.ledger.events import LoadRefused
from cluster.ledger.ledger import Ledger
from cluster.ledger.snapshot import ModelView
from cluster.ledger.specs import ModelSpec


class Done(NamedTuple):
    """The model is as its operator wants it."""

    model: str
    replicas: int


Ended = Done | LoadRefused


class _Call(NamedTuple):
    """`replicas` is how many are to be loaded; 0 is an unload."""

    model: str
    replicas: int
    answer: asyncio.Future[Ended]


class OperatorCalls:
    """The parked calls of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._parked: list[_Call] = []

    async def until(self, model: str, replicas: int) -> Ended:
        """Wait until so many replicas of a model are ready or have failed; with 0, until it is unloaded."""
        call = _Call(model, replicas, asyncio.get_running_loop().create_future())
        self._parked.append(call)
        try:
            self.review()
            return await call.answer
        finally:
            self._parked.remove(call)

    def review(self, commands: Iterable[Any] = ()) -> None:
        """Answer all whose time has come; `commands` are what the ledger has just decided. Never blocks."""
        if not self._parked:
            return
        refused = {each.model: each for each in commands if isinstance(each, LoadRefused)}
        for call in self._parked:
            if call.answer.done():
                continue
            ended: Ended | None = refused.get(call.model) if call.replicas else None
            if ended is None:
                ended = judge(call.model, call.replicas, self._ledger.model(call.model))
            if ended is not None:
                call.answer.set_result(ended)


def judge(model: str, replicas: int, view: ModelView | None) -> Ended | None:
    """How a call has ended, by what the ledger knows of its model; None while it has not.

    A failure is told only when no process of it is left.
    """
    if not replicas:
        return Done(model, 0) if view is None or not view.unloading else None
    if view is None:
        return LoadRefused(model, "ModelNotFound", f"the model {model!r} was removed", {})
    if view.ready >= replicas:
        return Done(model, view.ready)
    if view.ordered:
        return None
    if view.unloading or view.held_down:
        extras = {"code": "model_unloading", "status": 409}
        return LoadRefused(model, "ModelUnavailable", f"the model {model!r} was unloaded meanwhile", extras)
    if view.leaving:
        return None
    extras = {"code": "model_load_failed", "status": 500}
    reason = view.last_error or "its replicas were stopped"
    return LoadRefused(model, "ModelUnavailable", f"the model {model!r} failed to load: {reason}", extras)


def refuse_unload(model: str, view: ModelView | None) -> LoadRefused | None:
    """Why a model cannot be unloaded now; None if it can."""
    if view is None:
        return LoadRefused(model, "ModelNotFound", f"the model {model!r} does not exist", {})
    if view.ordered or view.state == "loading":
        extras = {"code": "model_loading", "status": 409}
        return LoadRefused(model, "ModelUnavailable", f"the model {model!r} is being loaded", extras)
    return None


def refuse_overrides(model: str, view: ModelView | None, replicas: int, spec: ModelSpec | None) -> LoadRefused | None:
    """Why a model cannot be loaded with overrides now; None if it can. What is loaded or loads keeps what it has.

    What the ledger itself would refuse is refused by it, except where the overrides would have changed the model.
    """
    invalid = {"code": "invalid_load_request"}
    if view is None or spec is None:
        return LoadRefused(model, "ModelNotFound", f"the model {model!r} does not exist", {})
    if not 1 <= replicas <= spec.max_replicas:
        message = f"replicas must be between 1 and {spec.max_replicas}"
        return LoadRefused(model, "InvalidRequest", message, invalid)
    if view.unloading:
        extras = {"code": "model_unloading", "status": 409}
        return LoadRefused(model, "ModelUnavailable", f"the model {model!r} is being unloaded", extras)
    if view.replicas or view.ordered:
        message = f"the model {model!r} is loaded or being loaded: overrides hold for a load of their own"
        return LoadRefused(model, "InvalidRequest", message, invalid)
    return None
