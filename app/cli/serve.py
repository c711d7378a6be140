"""Ray, Serve and the pool on this machine, from the first process to the last."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from app.cli.checks import refuse_full_disk
from app.cli.flags import DIRECT_INGRESS, OWN_RAY_FLAGS, direct_ingress_flags
from app.cli.reporter import Reporter
from cluster.config import ConfigError, PoolConfig
from cluster.sockets import free_port

#: How long running requests and Serve's own shutdown may take when the pool is stopped.
STOP_S = 5.0
#: The name of Serve's controller, which goes when everything that it looks after has gone.
CONTROLLER = "SERVE_CONTROLLER_ACTOR"


def serve_here(document: dict[str, Any], pool: PoolConfig, gpus: int | None) -> None:
    """Start Ray and Serve, show progress, and serve until interrupted. Raises `ConfigError` where Ray cannot start."""
    http = document["http_options"]
    document = with_public_port(document)
    failure = None
    try:
        print("Starting Ray …", flush=True)
        context = start_ray(gpus)
        start_serve(document)
        reporter = Reporter(f"http://{http['host']}:{http['port']}", pool, context)
        threading.Thread(target=reporter.run, name="slotpool-reporter", daemon=True).start()
        while (failure := reporter.failure) is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("Stopping …", flush=True)
    stop()
    if failure is not None:
        sys.exit(f"slotpool: {failure}")


def with_public_port(document: dict[str, Any]) -> dict[str, Any]:
    """Set Ray's flags, and give Serve's proxy another port than the public one, which is the ingress's own."""
    for flag, value in OWN_RAY_FLAGS.items():
        os.environ.setdefault(flag, value)
    if os.environ.get(DIRECT_INGRESS) == "0":
        return document
    http = document["http_options"]
    os.environ.update(direct_ingress_flags(http["port"]))
    return {**document, "http_options": {**http, "port": free_port()}}


def start_ray(gpus: int | None) -> Any:
    """A Ray of this process's own. Raises `ConfigError` where its files cannot be written."""
    # After the flags, which Ray reads while it is imported.
    import ray

    try:
        context = ray.init(
            address="local",
            num_gpus=gpus,
            namespace="serve",
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        refuse_full_disk()
        raise ConfigError(f"Ray did not start: {first_line(error)}") from None
    # Ray sets a handler of its own: SIGTERM stops the pool as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return context


def start_serve(document: dict[str, Any]) -> None:
    """Serve with the pool's application on it, not yet ready."""
    from ray.serve._private import api
    from ray.serve.schema import ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    schema = ServeDeploySchema.model_validate(document)
    client = api.serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
    client.deploy_apps(schema, _blocking=False)


def stop() -> None:
    """End Serve and Ray in order. Bounded; whatever has not ended by then is killed by the process above."""
    import ray

    with contextlib.suppress(Exception, KeyboardInterrupt):
        controller = ray.get_actor(CONTROLLER, namespace="serve")
        # Not `serve.shutdown()`: that waits inside a call to the controller, whose end Ray then reports as a failure.
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=STOP_S)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and ray.get_actor(CONTROLLER, namespace="serve"):
            time.sleep(0.05)
    with contextlib.suppress(Exception, KeyboardInterrupt):
        ray.shutdown()


def first_line(error: Exception) -> str:
    """What an error says, without the traceback that Ray puts into its messages."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
