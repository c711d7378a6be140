"""Reads a configuration: files, environment variables over them, and a line for every mistake.

Unknown keys are refused with their path and the nearest known key, since a mistyped key that is silently ignored costs
a user an evening.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cluster.config.files import ConfigError, Service, Source, joined, more_sources, read_source
from cluster.config.keys import ApiKey, hashed
from cluster.config.models import Group, ModelConfig, ServerEntry, backend_class
from cluster.config.pool import PoolConfig

#: Environment variables that override a pool-wide key, and the key.
ENVIRONMENT = {
    "INFERENCE_QUEUE_MAX_SIZE": "queue_max_size",
    "INFERENCE_REQUEST_TIMEOUT_SECONDS": "request_timeout_seconds",
    "DEFAULT_IDLE_TIMEOUT": "default_idle_timeout",
    "STARTUP_TIMEOUT": "startup_timeout",
    "EXECUTION_MODE": "execution_mode",
    "ENABLE_CPU_OFFLOAD": "enable_cpu_offload",
    "OFFLOAD_QUEUE_THRESHOLD": "offload_queue_threshold",
    "HEALTH_CHECK_INTERVAL": "health_check_interval",
    "SGLANG_MAX_RUNNING_REQUESTS": "sglang_max_running_requests",
    "SGLANG_MAX_TOTAL_TOKENS": "sglang_max_total_tokens",
}

#: Set to 1 for a Ray that was started for the pool alone: there replicas stay when their engine goes.
OWN_RAY = "SLOTPOOL_OWN_RAY"


def load_config(args: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ) -> PoolConfig:
    """Read the configuration from an application's `args`: the keys themselves, or `config: path` alone.

    Files that the environment names are read, too, and values of the environment variables in `ENVIRONMENT` win. Keys
    in clear are taken from a file only. Raises `ConfigError` with one line per mistake.
    """
    first, path = source_of(args, environ)
    more = list(more_sources(environ, path))
    data = joined([first, *more])
    source = " and ".join(each.name for each in (first, *more) if each.keys or not more)
    if environ.get(OWN_RAY) == "1":
        data.setdefault("max_asleep", "auto")
    for variable, key in ENVIRONMENT.items():
        if variable in environ:
            data[key] = environ[variable]
    try:
        for field in ("api_keys", "admin_keys"):
            if field in data:
                data[field] = hashed(
                    data[field], field, environ, may_be_clear=field not in first.keys or path is not None
                )
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    return checked(data, source)


def service_of(args: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ) -> Service:
    """Where the pool listens by its files; what the environment says is not in it. Raises `ConfigError`."""
    first, path = source_of(args, environ)
    found = [each.service for each in (first, *more_sources(environ, path))]
    host, port, log_level = (
        next((value for value in values if value is not None), None) for values in zip(*found, strict=True)
    )
    return Service(host, port, log_level)


def source_of(args: Mapping[str, Any] | None, environ: Mapping[str, str]) -> tuple[Source, Path | None]:
    """What an application's `args` say themselves, or the file that they name, with its path."""
    data = dict(args or {})
    if "config" not in data:
        return Source("serve_config.yaml: args", data), None
    path = Path(str(data.pop("config"))).expanduser()
    if data:
        raise ConfigError(f"args: 'config' stands alone, but {sorted(data)} stand beside it")
    return read_source(path, environ), path


def checked(data: Mapping[str, Any], source: str) -> PoolConfig:
    """The configuration of these keys. Raises `ConfigError` with one line per mistake, which names the source."""
    try:
        config = PoolConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, data, item) for item in error.errors())) from None
    return _without_gpus(config) if config.execution_mode == "cpu" else config


def _without_gpus(config: PoolConfig) -> PoolConfig:
    models = {name: model.model_copy(update={"num_gpus": 0.0, "gpu": ()}) for name, model in config.models.items()}
    return config.model_copy(update={"models": models})


def _explain(source: str, data: Mapping[str, Any], item: Any) -> str:
    """One line for one mistake; an unknown key is told the nearest known one, or the backend that it belongs to."""
    location = [str(part) for part in item["loc"]]
    path = ".".join(location)
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{source}: {path}: {message}" if path else f"{source}: {message}"
    key = location[-1]
    if location[0] == "models" and len(location) == 3:
        owners = sorted(name for name, each in ModelConfig.backends.items() if key in _keys(each))
        if owners:
            return f"{source}: {path}: only models of backend {' or '.join(owners)} have this key"
    near = difflib.get_close_matches(key, _known_keys(data, location), n=1)
    return f"{source}: {path}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def _known_keys(data: Mapping[str, Any], location: list[str]) -> list[str]:
    if location[0] == "models" and len(location) > 2:
        own = _class_of(data, location[1])
        if location[2] == "engine_kwargs":
            return _keys(own.model_fields["engine_kwargs"].annotation)
        return _keys(Group if location[2] == "group" and len(location) > 3 else own)
    if location[0] == "servers" and len(location) > 2:
        return _keys(ServerEntry)
    if location[0] in ("api_keys", "admin_keys"):
        return _keys(ApiKey)
    return _keys(PoolConfig)


def _class_of(data: Mapping[str, Any], model: str) -> type[ModelConfig]:
    """The configuration class of a model whose keys were refused."""
    return backend_class(data["models"][model])


def _keys(schema: Any) -> list[str]:
    """All keys of a schema, in either spelling."""
    fields: dict[str, FieldInfo] = schema.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias)]
