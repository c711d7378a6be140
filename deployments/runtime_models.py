"""Changes of the configuration while the pool runs, as one ingress makes them: compare, set, and bring Serve in line.

The ledger owns the configuration. A change is made from the version that this ingress knows, and made again from the
newer one where somebody else was faster. What cannot be is refused before anything changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import errors
from cluster.client import LedgerClient
from cluster.config import ConfigError, Configuration, PoolConfig, load_config
from cluster.config.share import share_of
from cluster.config.version import IdTaken, NoSuchModel, patched, reloaded, with_model, without_model
from deployments.applications import Applications
from deployments.requests import unknown_model
from deployments.weights import check_runtime_path

logger = logging.getLogger("slotpool.models")

#: How often a change is made anew, when others were faster each time.
ATTEMPTS = 10
#: How often it is looked whether the last replica of a removed model has gone, in seconds.
LEAVING_PERIOD_S = 0.1


class RuntimeModels:
    """Registers, changes and removes models. `estimated` adds to a configuration what its models' files say.

    `source` is the path of the configuration file, None where the configuration stands inline in Serve's `args`.
    Every method raises the `PoolError` that HTTP answers; those that change a model return the configuration then.
    """

    def __init__(
        self,
        ledger: LedgerClient,
        applications: Applications,
        estimated: Callable[[PoolConfig], PoolConfig],
        source: str | None,
    ) -> None:
        self._ledger = ledger
        self._applications = applications
        self._estimated = estimated
        self._source = source
        self._background: set[asyncio.Task[None]] = set()

    @property
    def configuration(self) -> Configuration:
        """The newest that this ingress knows."""
        configuration = self._ledger.configuration
        assert configuration is not None, "an ingress has a configuration"
        return configuration

    async def register(self, model: str, keys: Mapping[str, Any]) -> Configuration:
        """One model more. A taken id is 409, anything else that cannot be 422."""
        await self._check_path(keys)
        return await self._change(lambda configuration: with_model(configuration, model, keys))

    async def patch(self, model: str, keys: Mapping[str, Any]) -> Configuration:
        """Change keys of a model; None sets one back to its default. Only what its engine was started with drains it.

        A model whose replicas are to take another amount of Ray's books is unloaded first, so that its former
        application is empty when it moves to another.
        """
        await self._check_path(keys)
        before = self.configuration
        after = await self._checked(lambda configuration: patched(configuration, model, keys), before)
        moves = share_of(before.pool, before.pool.models[model]) != share_of(after.pool, after.pool.models[model])
        if moves:
            await self._ledger.unload(model)
        changed = await self._change(lambda configuration: patched(configuration, model, keys))
        if moves and changed.pool.models[model].min_replicas:
            self.load_in_background(model, changed.pool.models[model].min_replicas)
        return changed

    async def remove(self, model: str) -> None:
        """Remove a model, and wait until its streams have ended and nothing of it is left."""
        await self._change(lambda configuration: without_model(configuration, model))
        gone = False
        while not gone:
            await asyncio.sleep(LEAVING_PERIOD_S)
            gone = await self._is_gone(model)
        await self._applications.reconcile()

    async def reload(self) -> Configuration:
        """Read the configuration file again. 400 where there is none, 422 with a line per mistake in it."""
        if self._source is None:
            message = (
                "the configuration stands inline in Serve's args; only a file (args: {config: FILE}) can be read again"
            )
            raise errors.InvalidRequest(message, status=400)
        pool = await asyncio.to_thread(self._read, Path(self._source))
        return await self._change(lambda configuration: reloaded(configuration, pool))

    def load_in_background(self, model: str, replicas: int) -> None:
        """Begin to load a model; how that ends is for the lists to tell."""

        async def load() -> None:
            try:
                await self._ledger.load(model, replicas)
            except errors.PoolError as error:
                logger.warning("background load of %s: %s", model, error.message)

        # A task that nobody refers to may vanish.
        task = asyncio.create_task(load())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _change(self, change: Callable[[Configuration], Configuration]) -> Configuration:
        for _ in range(ATTEMPTS):
            before = self.configuration
            changed = await self._checked(change, before)
            taken = await self._ledger.replace_config(before.version, changed)
            if (taken.version, taken.pool) == (changed.version, changed.pool):
                with contextlib.suppress(Exception):
                    # What fails here is tried again by `Applications.follow`, and logged.
                    await self._applications.reconcile()
                return taken
        raise errors.BackendUnavailable("the configuration is being changed by others", retry_after=1)

    async def _checked(self, change: Callable[[Configuration], Configuration], before: Configuration) -> Configuration:
        try:
            changed = change(before)
        except NoSuchModel as error:
            raise unknown_model(error.model, list(before.pool.models)) from None
        except IdTaken as error:
            raise errors.InvalidRequest(str(error), param="id", status=409, code="model_exists") from None
        except ConfigError as error:
            raise errors.InvalidRequest(str(error), status=422) from None
        return changed._replace(pool=await asyncio.to_thread(self._estimated, changed.pool))

    async def _is_gone(self, model: str) -> bool:
        try:
            return all(replica.model != model for replica in (await self._ledger.status()).replicas)
        except errors.BackendUnavailable:
            return False  # A ledger that is being restarted hears of the replicas first.

    async def _check_path(self, keys: Mapping[str, Any]) -> None:
        """Raises `InvalidRequest` or `Forbidden` for a file that a request may not name."""
        adapters = keys.get("gguf_lora")
        listed = adapters if isinstance(adapters, list) else [adapters]
        paths = [each.get("path") if isinstance(each, Mapping) else each for each in listed]
        for path in (keys.get("model_path"), *paths):
            if isinstance(path, str):
                await asyncio.to_thread(check_runtime_path, path, self.configuration.pool.runtime_roots)

    def _read(self, path: Path) -> PoolConfig:
        try:
            return load_config({"config": str(path)})
        except ConfigError as error:
            raise errors.InvalidRequest(str(error).replace(str(path), path.name), status=422) from None
