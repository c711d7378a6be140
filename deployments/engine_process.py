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
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from cluster.config.models import ModelConfig
from cluster.errors import ModelUnavailable, PoolError, ReplicaGone
from cluster.frames import Connection, ConnectionEnded, frame, raise_file_limit
from deployments.engines.protocol import Call, Engine, Progress, Remembering, Reply, RunsProcess, Sleeper
from deployments.engines.registry import build_engine
from deployments.link_server import LinkServer
from deployments.parents import die_with_parent
from deployments.weights import find_weights

logger = logging.getLogger("slotpool.engine")

#: The kind of a control channel's frames, and the largest of them, in bytes: an order to load holds a configuration.
MESSAGE = b"j"
CONTROL_LIMITS = {MESSAGE: 2**24}

#: The least time between two reports of a load's progress, in seconds. llama.cpp has one for every tensor: to send the
#: 272 of a small model took half as much CPU as to load it.
PROGRESS_PERIOD_S = 0.1

#: What an engine's end is given to reach its calls, in seconds, before this process ends with it.
DEATH_S = 0.05

_PR_SET_NAME = 15


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
        self._working: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._is_asleep = False

    async def run(self) -> None:
        """Follow the supervisor's messages until it says `finish`. Raises `ConnectionEnded` when it is gone."""
        while True:
            _, payload = await self._control.read()
            said = json.loads(payload)
            match said["is"]:
                case "load":
                    self._begin(self._load(said), f"loading {said['model']}")
                case "sleep":
                    self._begin(self._sleep(), "putting the engine to sleep")
                case "wake":
                    self._begin(self._wake(), "waking the engine")
                case "ping":
                    self._asking = asyncio.create_task(self._pong())
                case "finish":
                    return await self._finish()

    async def _pong(self) -> None:
        """Answer for the engine, too, where that is another process: one that hangs is then taken to hang here."""
        if not isinstance(self._engine, RunsProcess) or self._is_asleep or await self._engine.answers():
            active, calls = self._server.load if self._server is not None else (0, 0)
            self._control.write(message("pong", active=active, calls=calls))

    def _begin(self, work: Coroutine[Any, Any, None], what: str) -> None:
        self._working = asyncio.create_task(self._do(work, what))

    async def _do(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """One thing that the supervisor has asked for; when it cannot be, say so."""
        try:
            await work
        except Exception as error:
            known = isinstance(error, PoolError)
            if not known:
                logger.exception("%s failed", what)
            reason = str(error) if known else f"{type(error).__name__} while {what.split()[0]}"
            self._control.write(message("failed", reason=reason))

    async def _load(self, order: dict[str, Any]) -> None:
        config = ModelConfig.model_validate({**order["config"], **order["overrides"]})
        path = await find_weights(config.model_path, in_folder=config.in_folder)
        engine = build_engine(order["model"], config, path)
        if order.get("kv_store") and isinstance(engine, Remembering):
            engine.remember_in(order["kv_store"])
        await engine.load(self._progress())
        server = LinkServer(order["model"], order["replica"], self._respond)
        await server.listener.listen_unix(Path(order["unix"]))
        port = await server.listener.listen_tcp(order["host"], order["token"]) if order["host"] else 0
        self._engine, self._server = engine, server
        if isinstance(engine, RunsProcess):
            self._watching = asyncio.create_task(self._watch(engine))
        self._say_ready(port=port)

    async def _watch(self, engine: RunsProcess) -> None:
        """End with the process in which the engine really is, and say why it did."""
        self._control.write(message("died", reason=await engine.died()))
        await self._control.drain()
        # What it ran has a moment to say so itself, and to whoever waits.
        await asyncio.sleep(DEATH_S)
        _end(1)

    async def _sleep(self) -> None:
        engine = self._sleeper()
        self._is_asleep = True
        kept = await engine.sleep()
        self._control.write(message("asleep", host_mib=kept.host_mib, device_mib=kept.device_mib))

    async def _wake(self) -> None:
        await self._sleeper().wake(self._progress())
        self._is_asleep = False
        self._say_ready()

    def _sleeper(self) -> Sleeper:
        if not isinstance(self._engine, Sleeper):
            raise ModelUnavailable("this engine cannot sleep")
        return self._engine

    async def _respond(self, call: Call) -> Reply:
        if self._engine is None or self._is_asleep:
            raise ReplicaGone("the engine sleeps")
        return await self._engine.call(call)

    def _progress(self) -> Progress:
        loop = asyncio.get_running_loop()

        def progress(fraction: float) -> None:
            loop.call_soon_threadsafe(self._control.write, message("progress", fraction=fraction))

        return at_most_every(PROGRESS_PERIOD_S, progress)

    def _say_ready(self, **fields: Any) -> None:
        assert self._engine is not None
        info = self._engine.info()
        said = {"pid": info.pid or os.getpid(), "memory_mib": info.memory_mib, "url": info.url}
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._control.write(message("ready", devices=devices, **said, **fields))

    async def _finish(self) -> None:
        """Let running calls end, which whoever asked bounds, and keep the conversations that are worth it.

        The engine itself is not asked to unload: the end of the process, and of its group, frees all that it has, and
        an engine that hangs cannot hold that up. One in a process of its own may tidy up before.
        """
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])
        if self._server is not None:
            self._server.listener.stop()
            await self._server.finished()
        if isinstance(self._engine, Remembering) and not self._is_asleep:
            try:
                saving = await self._engine.save()
            except Exception:
                logger.exception("conversations are not saved")
            else:
                self._control.write(message("saved", bytes=saving.bytes))
        if self._watching is not None and isinstance(self._engine, RunsProcess):
            self._watching.cancel()
            await self._engine.stop()


async def _host(control_socket: socket.socket) -> None:
    control = Connection(CONTROL_LIMITS)
    control_socket.setblocking(False)
    await asyncio.get_running_loop().create_connection(lambda: control, sock=control_socket)
    control.write(message("born", pid=os.getpid()))
    with contextlib.suppress(ConnectionEnded):
        await EngineProcess(control).run()
    # Here, since to close the event loop is to wait for the engine's threads.
    _end(0)


def become_child_of(parent: int) -> None:
    """Die with the process `parent`, and lead a process group, so that what the engine starts can be ended with it."""
    os.setsid()
    die_with_parent()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"slotpool-engine")
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
elif __name__ == "__mp_main__":
    # `multiprocessing` imports its parent's main module under this name: an engine library has started this process.
    die_with_parent()
