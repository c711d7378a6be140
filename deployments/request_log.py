"""One line of JSON for each request, at its end, where the configuration's `request_log` wants them.

It holds who asked for what, how it ended and where its time went (CONTRACT section 2), and never a prompt or an answer.
A line is written by the ingress that served the request, in one write to the page cache; a pool without a log pays
nothing for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path

from cluster import errors
from cluster.config import PoolConfig
from cluster.metrics import CLASSES, CLIENT_LEFT, family
from cluster.request import Request
from deployments.run_info import RunInfo
from deployments.sse import DONE

logger = logging.getLogger("slotpool.gateway")

#: What every line is called, for whoever reads them among others.
EVENT = "slotpool.inference"


class JsonLines(logging.Formatter):
    """A record as one line of JSON: when, how bad, what, and its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps({**head, **getattr(record, "fields", {})}, ensure_ascii=False)


class RequestLog:
    """The log of one ingress process, as its configuration wants it."""

    def __init__(self) -> None:
        self._target: str | None = None
        self._handler: logging.Handler | None = None

    @property
    def is_on(self) -> bool:
        """Whether lines are written."""
        return self._handler is not None

    def follow(self, config: PoolConfig) -> None:
        """From now on lines go where this configuration says. A file that cannot be opened is logged, and none are."""
        if config.request_log == self._target:
            return
        if self._handler is not None:
            self._handler.close()
        self._target, self._handler = config.request_log, None
        if self._target is None:
            return
        try:
            self._handler = _handler(self._target)
        except OSError as error:
            logger.error("requests are not logged: %s: %s", self._target, error.strerror)
            return
        self._handler.setFormatter(JsonLines())

    async def around(
        self, request: Request, info: RunInfo, chunks: AsyncGenerator[bytes, None], *, is_stream: bool
    ) -> AsyncGenerator[bytes, None]:
        """The chunks of a request's answer, and its line when they have ended, however they do."""
        status, code = CLIENT_LEFT, None
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    if chunk.endswith(DONE):
                        # Who leaves behind the last word has all of it.
                        status = info.status
                    yield chunk
            status = info.status
        except errors.PoolError as error:
            status, code = error.status, error.code
            raise
        except Exception:
            status, code = errors.PoolError.status, errors.PoolError.code
            raise
        finally:
            if info.failure is not None:
                status, code = info.failure.status, info.failure.code
            self._write(request, info, status, code, is_stream=is_stream)

    def _write(self, request: Request, info: RunInfo, status: int, code: str | None, *, is_stream: bool) -> None:
        if self._handler is None:
            return  # Turned off while it ran.
        fields = {
            "request_id": request.trace or request.id,
            "model": info.model or request.model,
            "requested_model": request.model,
            "family": family(request.path),
            "principal": request.principal,
            "priority": CLASSES.get(request.priority, "other"),
            "stream": is_stream,
            "status": status,
            "error": code,
            "metrics": info.metrics(),
        }
        self._handler.handle(logging.makeLogRecord({"levelname": "INFO", "msg": EVENT, "fields": fields}))


def _handler(target: str) -> logging.Handler:
    """Standard error of this process, or a file, which may be moved away at any time (logrotate); makes its folder."""
    if target == "stderr":
        # Not `sys.stderr`: Serve turns that into a log of its own.
        return logging.StreamHandler(sys.__stderr__)
    file = Path(target).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    return WatchedFileHandler(file, encoding="utf-8")
