"""A server that a command starts: its process, its output, and its end.

It belongs to the process group of whoever starts it, so it ends with that group, and it dies with that process however
that dies. Its output is read as it comes, so that it never waits for a reader, and so many lines of it are logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process

from cluster.errors import ModelUnavailable
from deployments.engines.launch import Launch
from deployments.parents import die_with_parent

logger = logging.getLogger("slotpool.server")
# Whatever level the engine process has: what a server says is what its operator looks for when it does not start.
logger.setLevel(logging.INFO)

#: A line is logged up to so many bytes, and so many bytes of lines in each period, in seconds: a server that logs its
#: every token fills no disk.
MAX_LINE = 4096
MAX_LOGGED, LOG_PERIOD_S = 1 << 20, 60.0
#: A server that was told to end has so long for it, in seconds, and is then killed.
STOP_S = 3.0


class ServerProcess:
    """One running command. `ended` is done once it is gone, with the reason in words."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid
        self._reading = asyncio.create_task(self._read())
        self.ended = asyncio.create_task(self._wait())

    @classmethod
    async def start(cls, launch: Launch) -> ServerProcess:
        """Start a command. Raises `ModelUnavailable` where there is none by this name."""
        parent = os.getpid()

        def bind_life() -> None:
            die_with_parent()
            if os.getppid() != parent:
                os._exit(1)  # It died before it could have been noticed.

        try:
            process = await asyncio.create_subprocess_exec(
                *launch.command,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env={**os.environ, **launch.environment},
                preexec_fn=bind_life,
            )
        except OSError as error:
            # The name as it was configured, without the folders of this machine.
            name = os.path.basename(launch.command[0])
            raise ModelUnavailable(f"the command {name!r} cannot be started: {error.strerror}") from None
        return cls(process)

    async def stop(self) -> None:
        """Tell it to end, and kill it where it does not. Idempotent."""
        for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, None)):
            if not self.ended.done():
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(number)
                await asyncio.wait([self.ended], timeout=patience_s)

    async def _wait(self) -> str:
        status = await self._process.wait()
        # What it had started may hold the pipe open; what the command itself has written is there.
        await asyncio.wait([self._reading], timeout=0.1)
        self._reading.cancel()
        if status >= 0:
            return f"the server ended with exit status {status}"
        return f"the server was killed by {signal.Signals(-status).name}"

    async def _read(self) -> None:
        assert self._process.stdout is not None, "it was asked for"
        log = _Lines()
        while part := await self._process.stdout.read(65536):
            log.add(part)
        log.end()


class _Lines:
    """Writes lines into the log, as many as may be."""

    def __init__(self) -> None:
        self._rest = b""
        self._left, self._until, self._omitted = MAX_LOGGED, time.monotonic() + LOG_PERIOD_S, 0

    def add(self, part: bytes) -> None:
        *lines, rest = (self._rest + part).split(b"\n")
        for line in lines:
            self._log(line)
        # The rest of a line that is too long anyway need not be kept.
        self._rest = rest[:MAX_LINE]

    def end(self) -> None:
        if self._rest:
            self._log(self._rest)
        self._tell_omitted()

    def _log(self, line: bytes) -> None:
        now = time.monotonic()
        if now >= self._until:
            self._tell_omitted()
            self._left, self._until = MAX_LOGGED, now + LOG_PERIOD_S
        line = line[:MAX_LINE].rstrip()
        if len(line) > self._left:
            self._left = 0
            self._omitted += 1
        elif line:
            self._left -= len(line)
            logger.info("%s", line.decode(errors="replace"))

    def _tell_omitted(self) -> None:
        if self._omitted:
            logger.warning("%d lines of the server's output were left out", self._omitted)
            self._omitted = 0
