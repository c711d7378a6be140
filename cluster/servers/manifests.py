"""Reads the manifests of external servers: once on demand, or again and again for as long as somebody follows.

Whatever a server does (refuse, hang, answer nonsense), the result is a manifest or a reason, within a bounded time.
Reasons are shown to people: they never hold a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import httpx

from cluster.ledger.events import ServerManifest
from cluster.ledger.specs import ServerSpec
from cluster.servers.types import base_url

#: A healthy server's manifest is read this often, in seconds.
PERIOD_S = 10.0
#: First and longest pause before a server is tried again; it doubles in between.
BACKOFF_S = (0.5, 10.0)
#: Bounds of one reading, in seconds and bytes.
TIMEOUT_S = 5.0
MAX_BYTES = 8 * 2**20


class ManifestError(Exception):
    """A manifest cannot be read; the message says why."""


class ManifestTimeout(ManifestError):
    """The server did not answer in time, which one that is busy may do, too."""


async def read_manifest(client: httpx.AsyncClient, server: ServerSpec) -> tuple[str, ...]:
    """The ids of the models that a server offers. Raises `ManifestError`; takes at most `TIMEOUT_S` seconds."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return _ids(await _get(client, f"{base_url(server.url)}/v1/models", auth_headers(server.api_key_env)))
    except (TimeoutError, httpx.TimeoutException):
        raise ManifestTimeout("it did not answer in time") from None
    except httpx.ConnectError:
        raise ManifestError("it cannot be connected to") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise ManifestError(f"reading its models failed: {type(error).__name__}") from None


def auth_headers(api_key_env: str | None) -> dict[str, str]:
    """The header with a server's key. Raises `ManifestError` when the variable is not set."""
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env)
    if not key:
        raise ManifestError(f"the environment variable {api_key_env} is not set")
    return {"Authorization": f"Bearer {key}"}


async def _get(client: httpx.AsyncClient, url: str, headers: dict[str, str]) -> bytes:
    async with client.stream("GET", url, headers=headers) as answer:
        if answer.status_code != 200:
            raise ManifestError(f"its list of models answered with status {answer.status_code}")
        body = bytearray()
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > MAX_BYTES:
                raise ManifestError("its list of models is too long")
        return bytes(body)


def _ids(body: bytes) -> tuple[str, ...]:
    try:
        rows: Any = json.loads(body)["data"]
        names = tuple(dict.fromkeys(row["id"] for row in rows))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ManifestError("it answered with something else than a list of models") from None
    if not all(isinstance(name, str) and name for name in names):
        raise ManifestError("it lists models without a name")
    return names


class ManifestWatch:
    """Keeps somebody posted about a changing set of servers; lives on one event loop."""

    def __init__(self, post: Callable[[ServerManifest], object]) -> None:
        self._post = post
        self._client: httpx.AsyncClient | None = None
        self._tasks: dict[ServerSpec, asyncio.Task[None]] = {}
        self._nudges: dict[str, asyncio.Event] = {}

    def follow(self, servers: Iterable[ServerSpec]) -> None:
        """Watch these servers and no others from now on. Does not wait."""
        wanted = dict.fromkeys(servers)
        for gone in [each for each in self._tasks if each not in wanted]:
            self._tasks.pop(gone).cancel()
        for server in wanted:
            if server not in self._tasks:
                nudge = self._nudges[server.url] = asyncio.Event()
                self._tasks[server] = asyncio.get_running_loop().create_task(self._watch(server, nudge))

    def check_now(self, url: str) -> None:
        """Somebody had trouble with a server: read its manifest again at once."""
        nudge = self._nudges.get(url)
        if nudge is not None:
            nudge.set()

    async def close(self) -> None:
        """Stop watching."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _watch(self, server: ServerSpec, nudge: asyncio.Event) -> None:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=TIMEOUT_S)
        client = self._client
        failures, was_up = 0, False
        clock = asyncio.get_running_loop().time
        while True:
            first, longest = BACKOFF_S
            read_at = clock()
            suspected = nudge.is_set()
            nudge.clear()
            try:
                models = await read_manifest(client, server)
                failures, was_up = 0, True
                self._post(ServerManifest(server.url, models))
            except ManifestError as error:
                failures += 1
                # A server that is busy may miss one reading, unless somebody has lost a request on it, too.
                if suspected or not (was_up and failures == 1 and isinstance(error, ManifestTimeout)):
                    was_up = False
                    self._post(ServerManifest(server.url, None, str(error)))
            pause_s = min(longest, first * 2.0 ** min(failures - 1, 30)) if failures else PERIOD_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(nudge.wait(), pause_s)
            # A server that fails requests and still lists its models is read no more often than this.
            await asyncio.sleep(max(0.0, read_at + first - clock()))
