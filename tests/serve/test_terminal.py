"""`slotpool serve` as a terminal, systemd or a container sees it: clear lines, an end in time, and nothing left."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.cli.supervisor import descendants
from tests.pool import free_port

ROOT = Path(__file__).parents[2]
#: An orderly stop may take so long, by the promise, on a machine that does nothing else.
END_S = 10
FAKE = """
models:
  quick: {backend: fake, min_replicas: 1, engine_kwargs: {tokens_per_s: 100, tokens: 10}}
  slow: {backend: fake, min_replicas: 1, engine_kwargs: {tokens_per_s: 10, tokens: 10000}}
"""
BROKEN = """
models:
  quick: {backend: fake, min_replicas: 1, engine_kwargs: {fault: load_fails}}
"""


class Terminal:
    """A pool on a pseudo-terminal, whose session it leads, so that it is in the foreground."""

    def __init__(self, config: Path, port: int, home: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": home,
            "RAY_AUTH_TOKEN_PATH": f"{home}/token",
            "INFERENCE_GPU_COUNT": "0",
        }
        # The tests' own Serve, in the same session of tests, has other ports.
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_SERVE_")}
        self.port = port
        self.output = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            command = [sys.executable, "-c", "from app.cli import main; main()", "serve"]
            os.execve(sys.executable, [*command, "--config", str(config), "--port", str(port)], environment)

    def wait_for(self, text: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self._read(), self.output

    def _read(self, timeout_s: float = 1.0) -> bool:
        """Take what there is on the screen. False at its end."""
        if select.select([self._terminal], [], [], timeout_s)[0]:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:
                return False
            self.output += re.sub(r"\x1b\[\d*m|\r", "", data.decode(errors="replace"))
            return bool(data)
        return True

    def type_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def end(self, timeout_s: float) -> tuple[int, float]:
        """Its exit status, and how long it took from now on."""
        started = time.monotonic()
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                took = time.monotonic() - started
                while self._read(0.1) and select.select([self._terminal], [], [], 0.1)[0]:
                    pass
                self.pid = 0
                return os.waitstatus_to_exitcode(status), took
            assert time.monotonic() < started + timeout_s, self.output
            self._read(0.05)

    def close(self) -> None:
        if self.pid:
            for pid in [*descendants(self.pid), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@contextlib.contextmanager
def terminal(config: str) -> Iterator[Terminal]:
    # Short, since it holds sockets.
    with tempfile.TemporaryDirectory(prefix="sp-", ignore_cleanup_errors=True) as home:
        Path(home, "token").write_text("0" * 64)
        Path(home, "pool.yaml").write_text(config)
        started = Terminal(Path(home, "pool.yaml"), free_port(), home)
        try:
            yield started
        finally:
            started.close()


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ctrl_c(pool: Terminal) -> None:
    pool.type_ctrl_c()


def group(stop: signal.Signals) -> object:
    def to_group(pool: Terminal) -> None:
        os.killpg(pool.pid, stop)

    to_group.__name__ = f"{stop.name} to the group"
    return to_group


@pytest.mark.parametrize("stop", [ctrl_c, group(signal.SIGTERM)], ids=lambda stop: stop.__name__)
def test_the_pool_ends_in_time_and_leaves_nothing(stop: object):
    """With a stream that would run for minutes, since that is when it matters."""
    with terminal(FAKE) as pool:
        pool.wait_for("Ctrl-C", 120)
        assert f"at http://127.0.0.1:{pool.port}" in pool.output
        assert "get-auth-token" in pool.output
        url = f"http://127.0.0.1:{pool.port}/v1/chat/completions"
        body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "x"}]}
        with httpx.Client(timeout=30) as client, client.stream("POST", url, json=body) as answer:
            next(answer.iter_lines())
            processes = descendants(pool.pid)
            assert len(processes) > 5
            stop(pool)  # type: ignore[operator]
            status, took = pool.end(60)
        assert status in (0, 1), pool.output
        # What the promise allows, and as much again for a machine that has other work.
        assert took < 2 * END_S, pool.output
        assert not [pid for pid in processes if is_there(pid)]
        assert pool.output.endswith("Stopping …\n"), pool.output
        assert "raylet" not in pool.output


def test_a_model_that_does_not_load_is_one_line():
    with terminal(BROKEN) as pool:
        pool.wait_for("quick failed: ", 120)
        pool.type_ctrl_c()
        pool.end(60)
        assert re.findall(r"^quick failed: .*$", pool.output, re.MULTILINE) == [
            "quick failed: quick fails to load, as configured"
        ]
        assert "Traceback" not in pool.output


def refusal(port: int, **environment: str) -> str:
    """What `slotpool serve` says when it does not even begin."""
    result = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_port_in_use_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refusal(port) == (
            f"slotpool: 127.0.0.1:{port}: Address already in use; choose another with PORT= or --port\n"
        )


def test_no_folder_for_ray_is_one_line(tmp_path: Path):
    missing = tmp_path / "missing"
    assert refusal(free_port(), RAY_TMPDIR=str(missing)) == (
        f"slotpool: {missing}: No such file or directory; Ray keeps its files there, RAY_TMPDIR names another\n"
    )


def test_a_full_disk_is_one_line(tmp_path: Path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system; tests/unit/test_terminal_checks.py has the rule")
    try:
        assert refusal(free_port(), RAY_TMPDIR=str(tmp_path)) == (
            f"slotpool: no space left for Ray in {tmp_path}: 1 MiB are free and 100 are needed; "
            "make room there, or name another folder with RAY_TMPDIR\n"
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
