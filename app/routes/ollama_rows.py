"""Models as Ollama lists them, by the configuration, the ledger and the models' files. Nothing is decided here."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from app.model_files import ModelFile
from cluster.config import ModelConfig, PoolConfig
from cluster.ledger.snapshot import ModelRow, Snapshot
from deployments.engines.registry import capabilities

#: What `expires_at` says of a model that stays.
NEVER = "2318-01-01T00:00:00Z"


def tag(name: str, model: ModelConfig | None, file: ModelFile) -> dict[str, Any]:
    """One row of `/api/tags`; a model of an external server has no configuration here."""
    return {
        "name": name,
        "model": name,
        "modified_at": stamp(file.modified_at),
        "size": file.size,
        "digest": digest(name, model),
        "details": details(model, file),
    }


def running(name: str, config: PoolConfig, ledger: Snapshot, file: ModelFile) -> dict[str, Any]:
    """One row of `/api/ps`."""
    model, row = config.models.get(name), ledger.models[name]
    size = (row.memory_mib or 0) << 20 or file.size
    context = None if model is None else model.context_length
    return {
        **tag(name, model, file),
        "size": size,
        "size_vram": size if model is not None and model.num_gpus else 0,
        "expires_at": _expires_at(config, model, row, ledger),
        # Only what is configured is known here: an engine that chose for itself does not tell the ledger.
        **({} if context is None else {"context_length": context}),
    }


def shown(name: str, model: ModelConfig | None, file: ModelFile) -> dict[str, Any]:
    """The answer of `/api/show`."""
    context = None if model is None else model.context_length
    info: dict[str, Any] = dict(file.metadata)
    if not info and context is not None:
        info = {"general.architecture": "unknown", "unknown.context_length": context}
    return {
        "modelfile": f"FROM {name}\n",
        "parameters": "" if context is None else f"num_ctx {context}",
        "template": "",
        "license": "",
        "modified_at": stamp(file.modified_at),
        "details": details(model, file),
        "model_info": info,
        "capabilities": abilities(model),
    }


def abilities(model: ModelConfig | None) -> list[str]:
    """What clients may ask for, in Ollama's words. Every model that chats takes tools (`engines/chat/tools.py`)."""
    known = ["chat"] if model is None else capabilities(model)
    if "chat" in known:
        return ["completion", "tools"]
    return ["embedding"] if "embeddings" in known else ["completion"]


def details(model: ModelConfig | None, file: ModelFile) -> dict[str, Any]:
    family = file.architecture or (model.backend if model is not None else "server")
    return {
        "parent_model": "",
        "format": "" if model is None else model.format or "",
        "family": family,
        "families": [family],
        "parameter_size": str(file.metadata.get("general.size_label", "")),
        "quantization_level": file.quantisation,
    }


def digest(name: str, model: ModelConfig | None) -> str:
    """Changes when the model under a name does. It is not the digest of any file."""
    return hashlib.sha256(f"{name} {'' if model is None else model.revision}".encode()).hexdigest()


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _expires_at(config: PoolConfig, model: ModelConfig | None, row: ModelRow, ledger: Snapshot) -> str:
    """When a model's idle time will be over if nobody asks for it; what runs now counts as asking."""
    idle_s = config.default_idle_timeout
    if model is not None and model.idle_timeout is not None:
        idle_s = model.idle_timeout
    if not idle_s or row.pinned:
        return NEVER
    used_at = ledger.now if row.leases or row.last_arrival is None else row.last_arrival
    return stamp(ledger.time + used_at + idle_s - ledger.now)
