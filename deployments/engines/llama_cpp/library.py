"""llama.cpp's library: imported once and lazily, since not every pool has it installed, and what it logs."""

from __future__ import annotations

import ctypes
import logging
import threading
from pathlib import Path
from typing import Any, cast

from cluster.errors import ModelUnavailable

log = logging.getLogger(__name__)

_ERROR_LEVEL = 4
_library_lock = threading.Lock()
_library: Any = None
_log_callback: Any = None
_collectors: list[LoggedErrors] = []


class LoggedErrors:
    """What llama.cpp logged as an error while a model loads: the only place where it says why.

    Paths are cut down to the files' names, since the reason reaches clients.
    """

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self.lines: list[str] = []

    def reason(self) -> str:
        reason = " ".join(self.lines)
        for path in self._paths:
            reason = reason.replace(path, Path(path).name)
        return reason[:500] or "no reason given"

    def __enter__(self) -> LoggedErrors:
        _collectors.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _collectors.remove(self)


def load_library() -> Any:
    """Import llama_cpp once for the process and silence all but its errors. Raises `ModelUnavailable`."""
    global _library, _log_callback
    with _library_lock:
        if _library is None:
            try:
                import llama_cpp
            except (ImportError, OSError, RuntimeError) as error:
                log.warning("llama-cpp-python does not start", exc_info=True)
                reason = type(error).__name__
                raise ModelUnavailable(f"llama-cpp-python is not installed or does not start: {reason}") from error
            _log_callback = llama_cpp.llama_log_callback(_on_log)
            llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _library = llama_cpp
        return _library


def _on_log(level: int, text: bytes, _: object) -> None:
    if level != _ERROR_LEVEL:
        return
    line = text.decode("utf-8", "replace").strip()
    log.warning("llama.cpp: %s", line)
    for collector in _collectors:
        collector.lines.append(line)


def schema_to_grammar(schema: str) -> str:
    """llama-cpp-python's own translation of a JSON schema into a GBNF grammar (it is MIT-licensed)."""
    load_library()
    from llama_cpp import llama_grammar

    return cast(str, llama_grammar.json_schema_to_gbnf(schema))
