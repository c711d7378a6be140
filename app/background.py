"""Responses that run while nobody waits for them (`background: true`).

One runs in the ingress process that took it; every other finds its state in the store. So a cancellation is written
into the store, and who runs it looks there from time to time, which also tells the others that it still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from app.routes.adapted import completion_of
from app.store import Store, Stored
from app.wire.responses.adapters import Responses
from cluster.errors import BackendUnavailable, PoolError
from cluster.request import Request
from deployments.gateway import Gateway
from deployments.run_info import RunInfo

logger = logging.getLogger("slotpool.http")

#: How often a running response looks whether it still should, in seconds, and after how long without that it is lost.
LOOK_S = 2.0
LOST_S = 60.0
RUNNING = ("queued", "in_progress")


class Background:
    """The responses that run in the background of this process."""

    def __init__(self, gateway: Gateway, store: Store) -> None:
        self._gateway, self._store = gateway, store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, adapter: Responses, stored: Stored, wanted: Request, chat: dict[str, Any]) -> None:
        """Run a response that has been admitted. Raises `BackendUnavailable` where nobody could ever read it."""
        adapter.response["status"] = "queued"
        if not await self._store.save(stored):
            raise BackendUnavailable("the store of responses does not answer", code="store_unavailable", retry_after=1)
        response: str = stored.response["id"]
        task = asyncio.create_task(self._run(adapter, stored, wanted, chat))
        self._tasks[response] = task
        task.add_done_callback(lambda _: self._tasks.pop(response))

    async def cancel(self, stored: Stored) -> dict[str, Any]:
        """End a running response, wherever it runs; the object that it then is."""
        response = {**stored.response, "status": "cancelled"}
        await self._store.save(Stored(stored.principal, response, stored.input))
        task = self._tasks.get(response["id"])
        if task is not None:
            task.cancel()
        return response

    async def _run(self, adapter: Responses, stored: Stored, wanted: Request, chat: dict[str, Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        watch = asyncio.create_task(self._watch(stored, task))
        info = RunInfo()
        try:
            adapter.whole(await completion_of(self._gateway.stream(wanted, chat, info)), info)
        except PoolError as error:
            adapter.fail(error)
        except asyncio.CancelledError:
            # Who has cancelled or deleted it has also said so in the store.
            return
        except Exception:
            logger.exception("the response %s failed", stored.response["id"])
            adapter.fail(PoolError("internal error"))
        finally:
            watch.cancel()
        if await self._is_wanted(stored):
            await self._store.save(stored)

    async def _watch(self, stored: Stored, task: asyncio.Task[None]) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(BackendUnavailable):
                if not await self._is_wanted(stored):
                    task.cancel()
                    return
                await self._store.touch(stored.response["id"])

    async def _is_wanted(self, stored: Stored) -> bool:
        found = await self._store.find(stored.response["id"], stored.principal)
        return found is not None and found.response["status"] in RUNNING


def as_it_stands(stored: Stored) -> dict[str, Any]:
    """The object of a stored response. One whose process has gone, in whatever way, has failed."""
    response = stored.response
    if response["status"] not in RUNNING or time.time() - stored.saved_at < LOST_S:
        return response
    error = {"code": "server_error", "message": "the process that ran this response is gone", "param": None}
    return {**response, "status": "failed", "error": {**error, "type": "BACKEND_UNAVAILABLE"}}
