"""The supervisor's side of an engine process: it is born, told to load, asked whether it lives, and ended.

Children are forked from the machine's nursery, which is started here when it is not there yet, or started by another
environment's interpreter. Nothing here knows of Ray, but for the process id of its raylet, with which all of it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import ModelUnavailable
from cluster.frames import Connection, ConnectionEnded, user_of
from cluster.home import ROOT, Home
from deployments import nursery
from deployments.engine_process import CONTROL_LIMITS, message
from deployments.parents import until_group_is_gone

#: A nursery listens within this time, in seconds: its imports, on a busy machine.
NURSERY_S = 60.0
#: A child says that it is born within this time, in seconds; another environment's interpreter imports first.
BIRTH_S = 60.0
#: An engine process that has not answered after this time, in seconds, hangs.
PING_S = 2.0
#: A process whose control channel has closed ends within this time, in seconds, or is killed.
END_S = 1.0
#: What it has started is killed with it, and gone within this time, in seconds, or nobody waits for it any longer.
GROUP_S = 5.0


class EngineDied(Exception):
    """The engine process is gone; the message says why, in words for an operator."""


def start_nursery(home: Home) -> Path:
    """The socket of the nursery that listens there, which is started if there is none. Blocks until it listens.

    Raises `ModelUnavailable` if it does not.
    """
    path = home.folder / nursery.SOCKET_NAME
    with open(home.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _listens(path):
            return path
        with open(home.folder / "nursery.log", "a") as log:
            subprocess.run(
                [sys.executable, "-m", "deployments.nursery", str(home.folder), "--raylet", str(home.raylet)],
                env={**os.environ, **nursery.ENVIRONMENT, "PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
                check=False,
            )
        deadline = time.monotonic() + NURSERY_S
        while not _listens(path):
            if time.monotonic() > deadline:
                raise ModelUnavailable("the process that starts engines did not start")
            time.sleep(0.01)
    return path


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return user_of(probe) == os.geteuid()
    return False


def _python_path() -> str:
    return os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


class EngineChild:
    """One engine process. `ended` is done once it is gone, with the reason in words."""

    def __init__(
        self, control: Connection, kill: Callable[[], None], status: asyncio.Future[int] | None = None
    ) -> None:
        """`status` is the exit status of a child of this very process; the nursery's children have theirs told."""
        self._control, self._kill, self._status = control, kill, status
        self.pid = 0
        #: What its engine has saved of its conversations at its end.
        self.saved_bytes = 0
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._born = asyncio.Event()
        self._pong: asyncio.Future[dict[str, Any]] | None = None
        self._is_killed = False
        self._answered: asyncio.Future[dict[str, Any]] | None = None
        self._progress: Callable[[float], None] = _ignore
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def fork(cls, home: Home, environment: dict[str, str], log: Path) -> EngineChild:
        """A child of the nursery. Raises `EngineDied` if it is not born, `ModelUnavailable` without a nursery."""
        path = await asyncio.to_thread(start_nursery, home)
        control = Connection(CONTROL_LIMITS, own_user_only=True)
        await asyncio.get_running_loop().create_unix_connection(lambda: control, str(path))
        request = {"environment": environment, "folder": str(home.folder), "log": str(log)}
        control.write(json.dumps(request).encode() + b"\n")
        # The nursery kills the child when this end closes, or says that nothing more will come.
        return await cls(control, control.finish_writing)._wait_for_birth()

    @classmethod
    async def start(cls, python: str, home: Home, environment: dict[str, str], log: Path) -> EngineChild:
        """A child that another environment's interpreter runs. Raises `EngineDied` if it is not born.

        Must be called from a thread that lives as long as the child: its death is the child's.
        """
        process, ours = _start(python, home, environment, log)
        control = Connection(CONTROL_LIMITS)
        await asyncio.get_running_loop().create_connection(lambda: control, sock=ours)

        def kill() -> None:
            # Not once it was waited for: its number may be another's by then.
            if process.returncode is None:
                for each in (os.killpg, os.kill):
                    with contextlib.suppress(OSError):
                        each(process.pid, signal.SIGKILL)

        return await cls(control, kill, _status_of(process, kill))._wait_for_birth()

    async def load(self, order: dict[str, Any], progress: Callable[[float], None]) -> dict[str, Any]:
        """Load an engine; what the process says of it. Raises `ModelUnavailable`, or `EngineDied`."""
        self._progress = progress
        return await self._ask("load", **order)

    async def sleep(self) -> dict[str, Any]:
        """Put the engine to sleep; what it still holds of the host and its devices. Raises as `load` does."""
        return await self._ask("sleep")

    async def wake(self, progress: Callable[[float], None]) -> dict[str, Any]:
        """Wake the engine; what the process says of it, as after a load. Raises as `load` does."""
        self._progress = progress
        return await self._ask("wake")

    async def _ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """Have the process do one thing with its engine, and wait for its answer; one at a time."""
        answered = self._answered = asyncio.get_running_loop().create_future()
        self._control.write(message(what, **fields))
        await _first_of(answered, self.ended)
        if not answered.done():
            raise EngineDied(self.ended.result())
        said: dict[str, Any] = answered.result()
        if said["is"] == "failed":
            raise ModelUnavailable(said["reason"])
        return said

    async def ping(self) -> tuple[int, int] | None:
        """How many calls run and how many there have been; None if the process does not answer in `PING_S`."""
        if self._pong is None or self._pong.done():
            self._pong = asyncio.get_running_loop().create_future()
        self._control.write(message("ping"))
        await asyncio.wait([self._pong], timeout=PING_S)
        if not self._pong.done():
            return None
        said = self._pong.result()
        return said["active"], said["calls"]

    def kill(self) -> None:
        """End it now, with all that it has started; `ended` tells when it is gone."""
        self._is_killed = True
        self._kill()

    async def end(self) -> None:
        """End it now, and wait until it is gone."""
        self.kill()
        await asyncio.shield(self.ended)

    async def finish(self) -> None:
        """Let running calls end, then the process; whoever calls bounds the former. Cancelled, it is killed."""
        self._control.write(message("finish"))
        try:
            await asyncio.shield(self.ended)
        finally:
            self.kill()

    async def _wait_for_birth(self) -> EngineChild:
        born = asyncio.create_task(self._born.wait())
        try:
            async with asyncio.timeout(BIRTH_S):
                await _first_of(born, self.ended)
        except TimeoutError:
            self.kill()
        except asyncio.CancelledError:
            # Nobody has it yet, so nobody else will end it.
            await self.end()
            raise
        finally:
            born.cancel()
        if not self._born.is_set():
            raise EngineDied(self.ended.result() if self.ended.done() else "the engine process did not start in time")
        return self

    async def _listen(self) -> None:
        why, told = "the engine process is gone", None
        try:
            while True:
                _, payload = await self._control.read()
                said = json.loads(payload)
                match said["is"]:
                    case "born":
                        self.pid = said["pid"]
                        self._born.set()
                    case "progress":
                        self._progress(said["fraction"])
                    case "ready" | "asleep" | "failed":
                        if self._answered is not None and not self._answered.done():
                            self._answered.set_result(said)
                    case "pong":
                        if self._pong is not None and not self._pong.done():
                            self._pong.set_result(said)
                    case "died":
                        told = said["reason"]
                    case "saved":
                        self.saved_bytes = said["bytes"]
                    case "exit":
                        why = _why(said["status"])
        except (ConnectionEnded, OSError, ValueError, KeyError):
            pass
        if self._status is not None:
            # The channel of one that ends by itself closes a moment before the process is gone.
            await asyncio.wait([self._status], timeout=END_S)
        self._kill()
        if self._status is not None:
            why = _why(await self._status)
        if self.pid:
            await until_group_is_gone(self.pid, GROUP_S)
        self.ended.set_result("the engine process was ended" if self._is_killed else told or why)


async def _first_of(*events: asyncio.Future[Any]) -> None:
    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)


def _ignore(_: float) -> None:
    pass


def _start(
    python: str, home: Home, environment: dict[str, str], log: Path
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process and the supervisor's end of its control channel. Takes milliseconds.

    `python` is a program's name, or a path, which begins at the folder of this code where it is not absolute.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs, open(log, "ab") as output:
        arguments = ["--control-fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        try:
            process = subprocess.Popen(
                [_program(python), "-m", "deployments.engine_process", *arguments],
                env={**environment, **nursery.ENVIRONMENT, "PYTHONPATH": ROOT},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=home.folder,
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            ours.close()
            raise ModelUnavailable(f"the model's interpreter could not be started: {error.strerror}") from None
    return process, ours


def _program(python: str) -> str:
    # Links are not followed: an environment's interpreter is a link, and known by where it lies.
    return os.path.join(ROOT, os.path.expanduser(python)) if os.sep in python else python


def _status_of(process: subprocess.Popen[bytes], kill: Callable[[], None]) -> asyncio.Future[int]:
    """Done with the exit status when the process has ended. What it has started is killed then."""
    loop = asyncio.get_running_loop()
    status: asyncio.Future[int] = loop.create_future()
    descriptor = os.pidfd_open(process.pid)

    def reap() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        kill()
        status.set_result(process.wait())

    loop.add_reader(descriptor, reap)
    return status


def _why(status: int) -> str:
    """Why a process has ended, in words."""
    if status >= 0:
        return f"the engine process ended with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (by hand, or for want of memory)" if -status == signal.SIGKILL else ""
    return f"the engine process was killed by {name}{hint}"
