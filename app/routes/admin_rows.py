"""Rows of the operators' lists, rendered from the configuration and the ledger's snapshot. Nothing is decided here."""

from __future__ import annotations

from typing import Any

from cluster.config import PoolConfig
from cluster.gpus import Gpu
from cluster.ledger.snapshot import ModelRow, Snapshot

#: A model that the ledger does not know yet.
NOTHING = ModelRow()


def admin_row(config: PoolConfig, name: str, ledger: Snapshot) -> dict[str, Any]:
    """One model in full. `replicas` is the number that is kept, `loaded_replicas` the number that serves now."""
    model = config.models[name]
    row = ledger.models.get(name, NOTHING)
    return {
        **memory_row(config, name, ledger),
        "resolved_backend": "llama_cpp" if model.backend == "gguf" else model.backend,
        "configured_enabled": model.enabled,
        "replicas": model.min_replicas,
        "replica_max": model.max_replicas,
        "loaded_replicas": row.ready,
        "inflight_requests": row.leases,
        "queue_depth": row.queued,
        "runtime_inflight": row.leases,
        "last_error": row.last_error,
        "load_constraints": {
            "replica_max": model.max_replicas,
            "num_gpus": model.num_gpus,
            "memory_budget_mib": config.mem_budget_mb or None,
        },
        "load_recommendations": {},
        "load_override": {},
        "definition": model.model_dump(mode="json", exclude_none=True),
    }


def memory_row(config: PoolConfig, name: str, ledger: Snapshot) -> dict[str, Any]:
    """One model and what one replica of it takes: measured at a load, or else estimated from its files.

    `vram_estimate_replica_count` replicas take that much each, now. A configured `memory_mib` is neither; it stands in
    the model's definition.
    """
    model = config.models[name]
    row = ledger.models.get(name, NOTHING)
    slots = [replica.slots for replica in ledger.replicas if replica.model == name]
    measured, estimate = row.memory_mib, config.estimate_mib(name)
    source = "observed_load_delta" if measured is not None else "model_artifact_size"
    if measured is None and estimate is None:
        source = "unavailable"
    state = runtime_state(row)
    return {
        "name": name,
        "runtime_state": state,
        "is_loaded": state == "loaded",
        "configured_target_inflight": model.target_inflight,
        "effective_target_inflight": slots[0] if slots else config.model_in_pool(model).slots,
        "vram_estimate_mib": estimate if measured is None else measured,
        "vram_estimate_replica_count": row.ready,
        "vram_estimate_source": source,
    }


def runtime_state(row: ModelRow) -> str:
    """`unloaded`, `loading`, `loaded`, `unloading` or `failed`; a load that still waits for room is `loading`."""
    return "loading" if row.loading and row.state in ("unloaded", "failed") else row.state


def is_resident(name: str, ledger: Snapshot) -> bool:
    """Whether a model has a place, waits for one by order, or has failed to get started."""
    return runtime_state(ledger.models.get(name, NOTHING)) != "unloaded"


def short_row(config: PoolConfig, name: str, ledger: Snapshot) -> dict[str, Any]:
    """One resident model in the short form of `/admin/models`; a draining one still counts as ready."""
    row = ledger.models.get(name, NOTHING)
    memory_mib = memory_row(config, name, ledger)["vram_estimate_mib"] or config.models[name].memory_mib
    used_at = row.last_arrival
    return {
        "id": name,
        "status": {"loading": "loading", "failed": "failed"}.get(runtime_state(row), "ready"),
        "mem_bytes": None if memory_mib is None else (memory_mib << 20) * max(1, row.ready),
        "last_used_secs_ago": None if used_at is None else max(0, round(ledger.now - used_at)),
        "inflight": row.leases,
    }


def gpu_row(node: str, gpu: Gpu) -> dict[str, Any]:
    """One device as the driver sees it."""
    return {
        "node": node,
        "index": gpu.number,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "used_mib": gpu.used_mib,
        "total_mib": gpu.total_mib,
        "used_over_total": f"{gpu.used_mib}MiB / {gpu.total_mib}MiB",
    }
