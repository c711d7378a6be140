"""The forkserver: engine processes are forked from one warm process per machine and Ray.

It has imported what engines need and initialised nothing: one thread, no event loop, no CUDA, no OpenMP team, no Ray.
A supervisor connects to its Unix socket and sends one line of JSON (environment, folder, log file); the child that is
forked keeps that connection as its control channel. The nursery keeps a copy, on which it never reads: when the
supervisor's end closes or says that nothing more will come, the child's process group is killed; when the child has
ended, its wait status is the last message. When Ray's own process on this machine (the raylet) ends, so does all of
this.

    python -m deployments.nursery FOLDER --raylet PID
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.frames import check_private, user_of
from cluster.home import memory_folder

logger = logging.getLogger("slotpool.nursery")

#: Imported before the first fork, where they are installed. Libraries that start threads, or take gigabytes (torch),
#: are left to the engines.
MODULES = (
    "deployments.engine_process",
    "deployments.engines.fake",
    "llama_cpp",
    "deployments.engines.llama_cpp.engine",
    "uvloop",
)
#: How often OpenMP's threads look at a barrier before they sleep; read when the library is loaded.
SPINS = "10000"
#: The environment in which they are imported: OpenMP's spinning is bounded (docs/measurements.md, "A noisy neighbour"),
#: and a library of linear algebra that would start threads does not. glibc asks for huge pages: a KV cache is zeroed
#: when it is made, and page by page that takes twice as long (docs/measurements.md, "Swaps with replicas that stay").
#: It is read when a process begins, so what is forked from here has it as well.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": SPINS,
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

SOCKET_NAME = "nursery.sock"
#: The longest request, in bytes: an environment, mostly.
MAX_REQUEST = 2**20
BACKLOG = 128


@dataclass
class _Child:
    """`end` becomes readable when the process has ended."""

    pid: int
    end: int
    control: socket.socket


class Nursery:
    """One loop over descriptors, and no thread: a process that is forked from it has nothing of another thread's."""

    def __init__(self, listener: socket.socket, raylet: int, host: Callable[[socket.socket], None]) -> None:
        """`host` runs the engine in the forked child; the child ends when it returns."""
        self._host = host
        self._listener = listener
        self._poll = select.poll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._requests: dict[int, tuple[socket.socket, bytearray]] = {}
        self._children: dict[int, _Child] = {}
        self._is_over = False
        self._watch(listener.fileno(), select.POLLIN, self._accept)
        self._watch(os.pidfd_open(raylet), select.POLLIN, self._end)

    def run(self) -> None:
        """Serve until the raylet ends, then kill all children."""
        try:
            while not self._is_over:
                for descriptor, events in self._poll.poll():
                    react = self._ready.get(descriptor)
                    if react is not None:
                        react(events)
        finally:
            for child in self._children.values():
                _kill(child.pid)

    def _watch(self, descriptor: int, events: int, react: Callable[[int], None]) -> None:
        self._ready[descriptor] = react
        self._poll.register(descriptor, events)

    def _forget(self, descriptor: int) -> None:
        self._ready.pop(descriptor, None)
        with contextlib.suppress(KeyError):
            self._poll.unregister(descriptor)

    def _end(self, _: int) -> None:
        self._is_over = True

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return
        if user_of(connection) != os.geteuid():
            connection.close()
            return
        connection.setblocking(False)
        self._requests[connection.fileno()] = (connection, bytearray())
        self._watch(connection.fileno(), select.POLLIN, lambda _: self._read(connection))

    def _read(self, connection: socket.socket) -> None:
        """Take more of a request; fork when it is complete."""
        descriptor = connection.fileno()
        said = self._requests[descriptor][1]
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said += data
        complete = said.endswith(b"\n")
        if data and not complete and len(said) <= MAX_REQUEST:
            return
        self._forget(descriptor)
        del self._requests[descriptor]
        try:
            if complete:
                self._fork(connection, json.loads(said))
                return
        except (ValueError, OSError) as error:
            logger.error("no engine process was started: %r", error)
        connection.close()

    def _fork(self, control: socket.socket, request: dict[str, Any]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_engine(control, parent, request)
        child = self._children[pid] = _Child(pid, os.pidfd_open(pid), control)
        self._watch(child.end, select.POLLIN, lambda _: self._reap(pid))
        # Of the control channel only its end is of interest; what is said on it is for the child.
        self._watch(control.fileno(), select.POLLRDHUP, lambda _: self._abandon(pid))

    def _become_engine(self, control: socket.socket, parent: int, request: dict[str, Any]) -> None:
        """The child's way from the fork on; never returns."""
        status = 1
        try:
            for number in range(1, signal.NSIG):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            # As the interpreter has it: who writes to a client that has left gets an error, and does not die of it.
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            from deployments.engine_process import become_child_of

            become_child_of(parent)
            log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            for standard in (1, 2):
                os.dup2(log, standard)
            kept = {child.control.fileno() for child in self._children.values()}
            for descriptor in {*self._ready, *kept, log}:
                if descriptor != control.fileno():
                    os.close(descriptor)
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["environment"])
            self._host(control)
            status = 0
        except BaseException as error:
            with contextlib.suppress(Exception):
                logger.error("the engine process could not begin: %r", error)
        finally:
            os._exit(status)

    def _abandon(self, pid: int) -> None:
        """The supervisor wants the child's end, or has met its own."""
        child = self._children.get(pid)
        if child is not None:
            self._forget(child.control.fileno())
            _kill(pid)

    def _reap(self, pid: int) -> None:
        """The child has ended: say why, and end what it has left behind."""
        from deployments.engine_process import message

        child = self._children.pop(pid)
        # Before it is waited for: its number is still its own, and so is the group's.
        _kill(pid)
        _, status = os.waitpid(pid, 0)
        for descriptor in (child.end, child.control.fileno()):
            self._forget(descriptor)
        os.close(child.end)
        with contextlib.suppress(OSError):
            child.control.send(message("exit", status=os.waitstatus_to_exitcode(status)))
        child.control.close()


def _kill(pid: int) -> None:
    """Kill a child with all that it has started; one that has just been forked may not lead its group yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def serve(folder: Path, raylet: int) -> None:
    """Listen in `folder`, which must be this user's own, until the raylet ends; then remove it, and what it has in
    memory."""
    from deployments.engine_process import serve as host

    check_private(folder)
    os.chdir(folder)
    unready = Path(f"{SOCKET_NAME}.{os.getpid()}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(unready))
        listener.listen(BACKLOG)
        # Made under another name, so that whoever finds it finds it listening.
        unready.rename(SOCKET_NAME)
        try:
            Nursery(listener, raylet, host).run()
        finally:
            for each in (folder, memory_folder(folder)):
                shutil.rmtree(each, ignore_errors=True)


def prepare() -> None:
    """Import what the engines need, and freeze it: a collection in a child would copy every page that it shares."""
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a library has started a thread while it was imported: this process cannot be forked")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--raylet", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Not a child of whoever started it, which would take it along: Ray's workers kill their children when they end.
    if os.fork():
        os._exit(0)
    prepare()
    serve(options.folder, options.raylet)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # As in `engine_process`: what a process that was forked from here has spawned dies with it.
    from deployments.parents import die_with_parent

    die_with_parent()
