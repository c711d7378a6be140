"""The command line: `slotpool serve` runs a pool on this machine and says what to type next.

It is `serve run serve_config.yaml` with three things around it: a Ray of its own with the logical GPUs asked for,
port and pool configuration laid over the file, and progress on the terminal.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from app.loopback import is_loopback
from cluster.config import ConfigError, PoolConfig, load_config, read_yaml

DEFAULT_FILE = Path("serve_config.yaml")

#: Flags that Ray reads when it starts. User code on Serve's own loop and thread halves the cost of a request; gRPC
#: between proxy and ingress halves that of a streamed chunk, and its messages must hold the largest body allowed.
#: Idle processes import what a replica needs before one is wanted, which makes a swap more than a second shorter.
#: Ray would let all its processes yield to anything else on the machine (niceness 15): a server should not.
RAY_FLAGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**30),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.early_body:middlewares",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_preload_python_modules": "deployments.preload",
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "1",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `slotpool` command."""
    parser = argparse.ArgumentParser(prog="slotpool", description="Many local LLMs, few GPUs, one endpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run a pool on this machine")
    serve.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE, help="the Serve configuration")
    serve.add_argument("--config", type=Path, help="a pool configuration that replaces the file's args")
    serve.add_argument("--port", type=int, help="HTTP port on the configured host")
    serve.add_argument("--gpus", type=int, help="logical GPUs that the local Ray declares (default: what is there)")
    options = parser.parse_args(argv)
    try:
        run(options.file, options.config, options.port, declared_gpus() if options.gpus is None else options.gpus)
    except ConfigError as error:
        sys.exit(f"slotpool: {error}")


def declared_gpus() -> int | None:
    """`INFERENCE_GPU_COUNT`, or None where it is not set. Raises `ConfigError` when it is not a number."""
    value = os.environ.get("INFERENCE_GPU_COUNT")
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise ConfigError(f"INFERENCE_GPU_COUNT: {value!r} is not a number of GPUs")


def run(file: Path, config: Path | None, port: int | None, gpus: int | None) -> None:
    """Start Ray and Serve, show progress, and serve until interrupted."""
    document = lay_over(read_yaml(file), config, port)
    pool = load_config(document["applications"][0].get("args"))
    http = document["http_options"]
    refuse_strangers_without_keys(http["host"], pool)
    refuse_taken_port(http["host"], http["port"])
    for flag, value in RAY_FLAGS.items():
        os.environ.setdefault(flag, value)
    # After the flags, which Ray reads while it is imported.
    import ray
    from ray.serve.scripts import cli

    print("Starting Ray …", flush=True)
    context = ray.init(
        address="local",
        num_gpus=gpus,
        namespace="serve",
        dashboard_host="127.0.0.1",
        log_to_driver=False,
    )
    # After Ray, which sets a handler of its own: SIGTERM stops the pool as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reporter = Reporter(f"http://{http['host']}:{http['port']}", pool, context)
    threading.Thread(target=reporter.run, name="slotpool-reporter", daemon=True).start()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="slotpool-") as merged:
        yaml.safe_dump(document, merged)
        merged.flush()
        cli.main(["run", merged.name])


def lay_over(document: dict[str, Any], config: Path | None, port: int | None) -> dict[str, Any]:
    """The Serve configuration with the command line's values in it. Raises `ConfigError` when it is not one."""
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError("a Serve configuration with exactly one application is needed")
    application = dict(applications[0])
    if config is not None:
        application["args"] = {"config": str(config.resolve())}
    http = {"host": "127.0.0.1", "port": 8000, **(document.get("http_options") or {})}
    http["host"] = os.environ.get("ROUTER_HOST", http["host"])
    http["port"] = port or int(os.environ.get("ROUTER_PORT", http["port"]))
    return {**document, "http_options": http, "applications": [application]}


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


class Reporter:
    """Says on the terminal how far the models are, and what to type once the pool is ready. Runs in a thread."""

    def __init__(self, url: str, pool: PoolConfig, context: Any) -> None:
        self._url = url
        self._pool = pool
        self._context = context
        self._last = ""

    def run(self) -> None:
        """Watch the pool until it is ready."""
        started = time.monotonic()
        with httpx.Client(base_url=self._url, timeout=5.0) as client:
            while True:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                    self._show(client.get("/v1/status").json()["ledger"])
                except (httpx.HTTPError, ValueError, KeyError):
                    self._line("Starting the endpoint …")
                time.sleep(0.3)
        self._line(f"Ready after {time.monotonic() - started:.1f} s.")
        self._say_what_next()

    def _show(self, ledger: dict[str, Any]) -> None:
        for replica in ledger["replicas"]:
            if replica["state"] == "STARTING":
                self._line(f"Loading {replica['model']} … {replica.get('progress', 0):.0%}")
        for name, model in ledger["models"].items():
            if model["last_error"]:
                self._line(f"{name} failed: {model['last_error']}")

    def _line(self, text: str) -> None:
        if text == self._last:
            return
        self._last = text
        print(text, flush=True)

    def _say_what_next(self) -> None:
        model = self._pool.default_model or next(iter(self._pool.models), "MODEL")
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is gravity?"}}]}}'
        dashboard = self._context.dashboard_url
        print(
            f"\nSlotpool serves {len(self._pool.models)} model(s) at {self._url}\n\n"
            f"  curl {self._url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'\n\n"
            f"  Any OpenAI client:   base_url={self._url}/v1\n"
            f"  Another Ray job:     RAY_AUTH_MODE=token RAY_ADDRESS={self._context.address_info['gcs_address']}\n"
            + (f"  The Ray dashboard:   http://{dashboard}\n" if dashboard else "")
            + "  Stop:                Ctrl-C\n",
            flush=True,
        )
