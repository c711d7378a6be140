"""The systemd unit: checked by systemd itself where it is there, and stopped within what the pool needs."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

from app.cli.supervisor import GRACE_S, KILL_S, LEFTOVER_S
from tests.unit.manifests.files import MANIFESTS, check_command

UNIT = MANIFESTS / "slotpool.service"


def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read(UNIT)
    return parser["Service"]


def test_systemd_takes_the_unit(tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        print("systemd is not installed: the unit's keys are not checked")
        return
    # The program of the unit is not on this machine.
    program = service()["ExecStart"].split()[0]
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program, "/bin/true"))
    run = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def test_it_runs_the_pool_and_gives_it_the_time_to_end():
    unit = service()
    check_command(unit["ExecStart"])
    # SIGTERM to the first process alone, which ends the others; what is left by then is killed with the group.
    assert unit["KillMode"] == "mixed"
    assert float(unit["TimeoutStopSec"]) > GRACE_S + LEFTOVER_S + KILL_S
