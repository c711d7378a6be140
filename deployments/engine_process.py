"""The process that hosts one engine: it loads it as its supervisor says, and serves the link's socket itself.

It knows nothing of Ray, of leases or of other models. Its supervisor speaks to it over the control channel, a socket
that it was born with: one JSON object per frame. When the supervisor's end closes, or whoever started it dies, it ends
at once and takes along whatever its engine has started. Another environment's interpreter may run it, so it imports
little.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from cluster.config.models import ModelConfig
from cluster.errors import PoolError
from deployments.engines.protocol import Engine, Progress
from deployments.engines.registry import build_engine
from deployments.frames import Connection, ConnectionEnded, frame, raise_file_limit
from deployments.link_server import LinkServer
from deployments.weights import find_weights

logger = logging.getLogger("slotpool.engine")

#: The kind of a control channel's frames, and the largest of them, in bytes: an order to load holds a configuration.
MESSAGE = b"j"
CONTROL_LIMITS = {MESSAGE: 2**24}

#: The least time between two reports of a load's progress, in seconds. llama.cpp has one for every tensor: to send the
#: 272 of a small model took half as much CPU as to load it.
PROGRESS_PERIOD_S = 0.1

#: An engine that takes longer to unload than this, in seconds, is ended with its process.
UNLOAD_S = 10.0

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def message(kind: str, **fields: Any) -> bytes:
    """One frame of the control channel."""
    return frame(MESSAGE, json.dumps({"is": kind, **fields}).encode())


def at_most_every(period_s: float, report: Progress) -> Progress:
    """`report`, without the calls that come sooner than `period_s` after one that went through."""
    next_at = 0.0

    def progress(fraction: float) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now >= next_at:
            next_at = now + period_s
            report(fraction)

    return progress


class EngineProcess:
    """One engine, from the order to load it to the end of the process."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._engine: Engine | None = None
        self._server: LinkServer | None = None
        self._loading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Follow the supervisor's messages until it says `finish`. Raises `ConnectionEnded` when it is gone."""
        while True:
            _, payload = await self._control.read()
            said = json.loads(payload)
            match said["is"]:
                case "load":
                    self._loading = asyncio.create_task(self._load(said))
                case "ping":
                    active, calls = self._server.load if self._server is not None else (0, 0)
                    self._control.write(message("pong", active=active, calls=calls))
                case "finish":
                    return await self._finish()

    async def _load(self, order: dict[str, Any]) -> None:
        """Load the engine and listen; then, or when it cannot be, say so."""
        loop = asyncio.get_running_loop()

        def progress(fraction: float) -> None:
            loop.call_soon_threadsafe(self._control.write, message("progress", fraction=fraction))

        try:
            config = ModelConfig.model_validate({**order["config"], **order["overrides"]})
            path = await find_weights(config.model_path)
            engine = build_engine(order["model"], config, path)
            await engine.load(at_most_every(PROGRESS_PERIOD_S, progress))
            await self._listen(order, engine)
        except Exception as error:
            known = isinstance(error, PoolError)
            if not known:
                logger.exception("loading %s failed", order["model"])
            reason = str(error) if known else f"{type(error).__name__} while loading"
            self._control.write(message("failed", reason=reason))

    async def _listen(self, order: dict[str, Any], engine: Engine) -> None:
        server = LinkServer(order["model"], order["replica"], engine.call)
        await server.listen_unix(Path(order["unix"]))
        port = await server.listen_tcp(order["host"], order["token"]) if order["host"] else 0
        self._engine, self._server = engine, server
        self._control.write(
            message(
                "ready",
                pid=os.getpid(),
                port=port,
                memory_mib=engine.info().memory_mib,
                devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            )
        )

    async def _finish(self) -> None:
        """Let running calls end, which whoever asked bounds, then have the engine end what it has started."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        if self._server is not None:
            self._server.stop_listening()
            await self._server.finished()
        if self._engine is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._engine.unload(), UNLOAD_S)


async def _host(control_socket: socket.socket) -> None:
    control = Connection(CONTROL_LIMITS)
    control_socket.setblocking(False)
    await asyncio.get_running_loop().create_connection(lambda: control, sock=control_socket)
    control.write(message("born", pid=os.getpid()))
    with contextlib.suppress(ConnectionEnded):
        await EngineProcess(control).run()


def become_child_of(parent: int) -> None:
    """Die with the process `parent`, and lead a process group, so that what the engine starts can be ended with it."""
    os.setsid()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, b"slotpool-engine")
    if os.getppid() != parent:
        os._exit(1)  # It died before it could have been noticed.


def serve(control: socket.socket) -> None:
    """Host an engine until the supervisor ends it; the process ends here."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_host(control))
    except BaseException:
        logger.exception("the engine process failed")
        _end(1)
    _end(0)


def _end(status: int) -> None:
    """End without the interpreter's farewell, which may hang in an engine's threads, and take along the group."""
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.killpg(0, signal.SIGTERM)
    os._exit(status)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def main() -> None:
    """Run in an interpreter of its own, for a model that names one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    become_child_of(options.parent)
    serve(socket.socket(fileno=options.control_fd))


if __name__ == "__main__":
    main()
