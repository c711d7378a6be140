"""Two processes: one that the terminal's signals reach, and the pool in a session of its own.

A SIGINT or SIGTERM often goes to a whole process group: Ctrl-C, systemd, a container's runtime. Ray's raylet ends at
a SIGTERM at once, and an orderly stop would then wait for processes that are gone. So everything runs in a child that
leads a session of its own, and only this parent stays in the caller's group. It tells the child to stop, waits for a
bounded time, and kills what is left. Orphans of the pool become its children (it is their subreaper), so that "what is
left" is exact and needs no list of names.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

#: How long the pool may take to stop in order, running requests included.
GRACE_S = 7.5
#: How long what the pool has started may outlive it.
LEFTOVER_S = 1.0
#: After this long even what cannot be killed (a process in an uninterruptible call) is left alone.
KILL_S = 3.0

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def continue_in_own_session() -> None:
    """Go on in a child that leads a session of its own. Returns in that child only; the parent waits and exits."""
    adopt_orphans()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, signal.SIGCHLD})
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before - STOPS)
        if os.getppid() != parent:
            sys.exit(1)
        return
    code = _wait_for(child)
    _end_what_is_left()
    sys.stdout.flush()
    os._exit(code)


def adopt_orphans() -> None:
    """Whatever descends from this process stays below it, also when the processes between have ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _wait_for(child: int) -> int:
    """The exit status for this process, once the child has ended or must not be waited for any longer."""
    deadline: float | None = None
    while True:
        status = _reap(child)
        if status is not None:
            return status
        left = 3600.0 if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return 1
        received = signal.sigtimedwait({*STOPS, signal.SIGCHLD}, left)
        if received is None or received.si_signo == signal.SIGCHLD:
            continue
        if deadline is not None:
            return 1  # asked twice: at once, then
        deadline = time.monotonic() + GRACE_S
        os.kill(child, signal.SIGINT)


def _reap(child: int) -> int | None:
    """Collect whatever has ended; the child's exit status if it was among that."""
    ended = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                ended = code if code >= 0 else 128 - code
    return ended


def _end_what_is_left() -> None:
    """Wait a moment for the rest of the pool's processes, then kill them."""
    started = time.monotonic()
    while (left := descendants(os.getpid())) and time.monotonic() < started + LEFTOVER_S + KILL_S:
        if time.monotonic() > started + LEFTOVER_S:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        _reap(-1)


def descendants(root: int) -> list[int]:
    """All processes below `root`, itself not among them."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # The name in parentheses may hold anything; the state and the parent follow the last one.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _prctl(option: int, value: int) -> None:
    """Linux only, as the pool is; where it is refused, an orphan may outlive the pool."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
