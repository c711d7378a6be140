"""What NVIDIA's driver says of this machine's GPUs: names, memory, and how much of it a process holds.

Read through the NVML binding that Ray, or vLLM, brings along, so no package is needed for it. A machine without a
driver is no error: there are no GPUs, and a reason. Every call blocks for some milliseconds; only reads, never sets
anything.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

MIB = 1 << 20

T = TypeVar("T")


class Gpu(NamedTuple):
    """One device of this machine, by its number there; memory in MiB."""

    number: int
    uuid: str
    name: str
    used_mib: int
    total_mib: int


def read_gpus() -> tuple[list[Gpu], str | None]:
    """This machine's GPUs, and why there are none if the driver cannot be asked."""
    return _ask(_read, [])


def held_mib(pid: int) -> int | None:
    """Device memory that a process of this machine holds, in MiB; None where that cannot be told.

    In a container the driver knows processes by other numbers, so "none" is not to be taken for zero.
    """

    def read(nvml: Any, devices: list[Any]) -> int | None:
        held = [
            process.usedGpuMemory
            for device in devices
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)
            if process.pid == pid
        ]
        return None if not held or None in held else sum(held) // MIB

    return _ask(read, None)[0]


def _read(nvml: Any, devices: list[Any]) -> list[Gpu]:
    gpus = []
    for number, device in enumerate(devices):
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        name, uuid = _text(nvml.nvmlDeviceGetName(device)), _text(nvml.nvmlDeviceGetUUID(device))
        gpus.append(Gpu(number, uuid, name, memory.used // MIB, memory.total // MIB))
    return gpus


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _binding() -> Any:
    """The NVML binding of this environment: an engine's own has no Ray, but maybe vLLM's copy."""
    for name in ("ray._private.thirdparty.pynvml", "pynvml", "vllm.third_party.pynvml"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def _ask(question: Callable[[Any, list[Any]], T], otherwise: T) -> tuple[T, str | None]:
    """Put a question to the driver; `otherwise` and the reason if it gives no answer."""
    nvml = _binding()
    if nvml is None:
        return otherwise, "the NVML binding is not installed"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return otherwise, f"no NVIDIA driver: {error}"
    try:
        count = nvml.nvmlDeviceGetCount()
        return question(nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]), None
    except nvml.NVMLError as error:
        return otherwise, f"the NVIDIA driver gives no answer: {error}"
    finally:
        nvml.nvmlShutdown()
