"""What a pool costs while nobody asks it anything: CPU and memory of all its processes, and how soon it is ready.

    python tests/bench/bench_idle.py [--seconds 20] [--json FILE]

It runs `slotpool serve` as a user does, with two models of which none is loaded. CPU is in percent of one core,
memory the proportional set size (PSS): what processes share counts once.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.cli.supervisor import descendants
from tests.bench.processes import cpu_s, memory_mib
from tests.pool import fake, free_port

#: What the start leaves behind is over by then, in seconds.
SETTLE_S = 15.0


def name_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    first = Path(words[0]).name or "?"
    return words[0] if words[0].startswith("ray::") else next((w for w in words if w.endswith(".py")), first)


def measure(root: int, seconds: float) -> dict[str, tuple[float, float]]:
    """CPU in percent and memory in MiB of the pool's processes, by what they call themselves."""
    before = {}
    for pid in [root, *descendants(root)]:
        try:
            before[pid] = cpu_s(pid)
        except OSError:
            continue
    time.sleep(seconds)
    rows: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for pid, used in before.items():
        try:
            cpu, memory = (cpu_s(pid) - used) / seconds * 100, memory_mib(pid)
            name = Path(name_of(pid)).name
        except OSError:
            continue
        rows[name] = (rows[name][0] + cpu, rows[name][1] + memory)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "pool.yaml")
        config.write_text(yaml.safe_dump({"models": {"a": fake(), "b": fake()}}))
        command = [str(Path(sys.executable).with_name("slotpool")), "serve", "--port", str(port)]
        started = time.monotonic()
        pool = subprocess.Popen([*command, "--config", str(config), "--gpus", "1"], stdout=subprocess.DEVNULL)
        try:
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                assert time.monotonic() - started < 120, "the pool did not become ready"
                time.sleep(0.05)
            ready_s = time.monotonic() - started
            time.sleep(SETTLE_S)
            rows = measure(pool.pid, options.seconds)
        finally:
            pool.send_signal(signal.SIGINT)
            pool.wait(60)
    for name, (cpu, memory) in sorted(rows.items(), key=lambda row: -row[1][0]):
        print(f"{name:<44}{cpu:>8.2f} %{memory:>9.0f} MiB")
    values = {
        "idle_cpu_percent": round(sum(cpu for cpu, _ in rows.values()), 2),
        "idle_memory_mib": round(sum(memory for _, memory in rows.values())),
        "ready_s": round(ready_s, 2),
    }
    for key, value in values.items():
        print(f"{key} = {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
