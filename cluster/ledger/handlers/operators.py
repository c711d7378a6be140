"""What operators do: the configuration changes, models are loaded and unloaded."""

from __future__ import annotations

import logging

from cluster.ledger.books.pool import Pool
from cluster.ledger.books.queue import INFINITY
from cluster.ledger.books.records import Model, Order
from cluster.ledger.books.servers import is_remote
from cluster.ledger.events import ConfigChanged, LoadRefused, LoadRequested, UnloadRequested
from cluster.ledger.handlers import server_events
from cluster.ledger.handlers.requests import refuse_or_reroute
from cluster.ledger.rules import policy
from cluster.ledger.specs import PoolSpec
from cluster.ledger.states import ReplicaState

log = logging.getLogger(__name__)


def config_changed(pool: Pool, event: ConfigChanged, now: float) -> None:
    """Take a new configuration; only what changed drains, and nothing that runs is cut."""
    pool.spec = event.spec
    pool.book.keeps_replicas = event.spec.max_asleep != 0
    pool.book.bonds = _bonds(event.spec)
    # A capacity that was lowered is reached again as models come and go, never by cutting.
    pool.capacity_was = len(pool.resident)
    for name, model in list(pool.models.items()):
        spec = event.spec.models.get(name)
        if spec is None:
            if not server_events.keep(pool, model):
                _remove(pool, model, now)
        elif model.removed or spec != model.spec:
            model.removed = False
            if spec.revision != model.spec.revision:
                model.fastest_load_s, model.loads_seen = INFINITY, 0
            model.spec = spec
            model.reshape()
            model.held_down = False
    for name, spec in event.spec.models.items():
        if name not in pool.models:
            pool.models[name] = Model(spec, now)
    server_events.configure(pool, event.spec.servers, now)
    pool.lacks_processes = True
    for model in pool.models.values():
        pool.touched[model] = None
    pool.book.version += 1


def _bonds(spec: PoolSpec) -> dict[str, set[tuple[str, ...]]]:
    """What the models of each sharing group are bound to."""
    bonds: dict[str, set[tuple[str, ...]]] = {}
    for model in spec.models.values():
        if model.group is not None and model.group_share and model.devices and model.num_gpus:
            bonds.setdefault(model.group, set()).add(model.devices)
    return bonds


def _remove(pool: Pool, model: Model, now: float) -> None:
    """A model left the configuration: its waiters are refused, its replicas drain, then its record goes."""
    model.removed = True
    model.order = None
    refusal = policy.Refusal("ModelNotFound", f"the model {model.name!r} was removed", {})
    for waiter in list(model.queue):
        refuse_or_reroute(pool, waiter, now, refusal)
    pool.touched[model] = None


def load_requested(pool: Pool, event: LoadRequested, now: float) -> None:
    """Load so many replicas of a model, all or none. A refusal leaves everything as it was."""
    model = pool.models.get(event.model)
    if model is None or model.removed:
        pool.out.append(LoadRefused(event.model, "ModelNotFound", f"the model {event.model!r} does not exist", {}))
        return
    if is_remote(model):
        message = f"the model {model.name!r} is loaded by its server, when it is asked for"
        pool.out.append(LoadRefused(model.name, "InvalidRequest", message, {"code": "invalid_load_request"}))
        return
    if not 1 <= event.replicas <= model.spec.max_replicas:
        message = f"replicas must be between 1 and {model.spec.max_replicas}"
        pool.out.append(LoadRefused(model.name, "InvalidRequest", message, {"code": "invalid_load_request"}))
        return
    refusal = policy.unloading(model) if model.unloading else policy.too_large(pool, model, event.replicas)
    if refusal is not None:
        pool.out.append(LoadRefused(model.name, *refusal))
        return
    if not model.counts[ReplicaState.READY]:
        # What the last request asked for ended with its stay: `keep_alive: 0` would end this load at once.
        model.keep_alive_s = None
    model.held_down = False
    model.backoff_until = now
    model.refusing = False
    before = model.order
    if model.counts[ReplicaState.READY] < event.replicas and (before is None or before.replicas < event.replicas):
        model.order = Order(event.replicas, now + model.spec.load_timeout_s)
        if before is not None:
            model.order.batch.update(before.batch)
    pool.touched[model] = None


def unload_requested(pool: Pool, event: UnloadRequested, now: float) -> None:
    """Unload a model: refuse the queued, let the running finish. Of one that is not loaded: nothing to do.

    What a request asked for (a pin, too) ends with it.
    """
    model = pool.models.get(event.model)
    if model is None:
        log.info("unload of unknown model %s ignored", event.model)
        return
    model.order = None
    model.keep_alive_s = None
    model.held_down = True
    model.unloading = bool(model.placed)
    refusal = policy.unloading(model)
    for waiter in list(model.queue):
        refuse_or_reroute(pool, waiter, now, refusal)
    pool.touched[model] = None
