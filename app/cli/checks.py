"""What is refused before anything is started, in one line that says what to do."""

from __future__ import annotations

import os
import shutil
import socket

from app.loopback import is_loopback
from cluster.config import ConfigError, PoolConfig

#: Ray's logs and sockets, and some room to write more.
LEAST_FREE_MIB = 100


def refuse_strangers_without_keys(host: str, pool: PoolConfig) -> None:
    """Raises `ConfigError` when other machines could reach a pool that asks nobody for a key."""
    if not (pool.api_keys or pool.admin_keys or is_loopback(host)):
        raise ConfigError(f"http_options.host: {host} is open to other machines; configure api_keys, or use 127.0.0.1")


def refuse_taken_port(host: str, port: int) -> None:
    """Raises `ConfigError` when something listens there already: its answers would be taken for the pool's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{host}:{port}: {error.strerror}; choose another with PORT= or --port") from None


def ray_folder() -> str:
    """Where Ray puts its session's files, by Ray's own rule."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def refuse_full_disk() -> None:
    """Raises `ConfigError` where Ray could not write its files: it would die later, and not say why."""
    folder = ray_folder()
    try:
        free_mib = shutil.disk_usage(folder).free // 2**20
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; Ray keeps its files there, RAY_TMPDIR names another") from None
    if free_mib < LEAST_FREE_MIB:
        raise ConfigError(
            f"no space left for Ray in {folder}: {free_mib} MiB are free and {LEAST_FREE_MIB} are needed; "
            "make room there, or name another folder with RAY_TMPDIR"
        )
