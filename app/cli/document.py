"""The Serve configuration that a command line means: the file, with the command's and the environment's values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster.config import ConfigError, service_of


def declared_gpus() -> int | None:
    """`INFERENCE_GPU_COUNT`, or None where it is not set. Raises `ConfigError` when it is not a number."""
    value = os.environ.get("INFERENCE_GPU_COUNT")
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise ConfigError(f"INFERENCE_GPU_COUNT: {value!r} is not a number of GPUs")


def lay_over(document: dict[str, Any], config: Path | None, port: int | None) -> dict[str, Any]:
    """The Serve configuration with the command line's values in it. Raises `ConfigError` when it is not one."""
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError("a Serve configuration with exactly one application is needed")
    application = dict(applications[0])
    if config is not None:
        application["args"] = {"config": str(config.resolve())}
    service = service_of(application.get("args"))
    http = {"host": "127.0.0.1", "port": 8000, **(document.get("http_options") or {})}
    http["host"] = os.environ.get("ROUTER_HOST") or service.host or http["host"]
    http["port"] = port or _port(os.environ.get("ROUTER_PORT")) or service.port or http["port"]
    laid = {**document, "http_options": http, "applications": [application]}
    if service.log_level is not None:
        laid["logging_config"] = {**(document.get("logging_config") or {}), "log_level": service.log_level.upper()}
    return laid


def _port(value: str | None) -> int | None:
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise ConfigError(f"ROUTER_PORT: {value!r} is not a port")
