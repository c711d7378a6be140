"""The configuration that is in force, as the ledger actor owns it: the newest that it was told.

Nothing here waits or posts; each method says whether the configuration has changed, and the actor does the rest.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from cluster.config import ConfigError
from cluster.config.version import Configuration, merged, overridden, with_overrides
from cluster.ledger.specs import PoolSpec
from cluster.orders import Load

logger = logging.getLogger("slotpool.ledger")


class OwnedConfiguration:
    """One configuration, replaced as a whole."""

    def __init__(self, configuration: Configuration) -> None:
        self.current = configuration
        self.spec = pool_spec(configuration)

    def meet(self, announced: Configuration) -> bool:
        """An ingress has announced the one that it has: the newer of the two is in force, whichever came first."""
        return self._take(merged(self.current, announced))

    def replace(self, expected: tuple[float, int], configuration: Configuration) -> bool:
        """Take a changed configuration if nothing has changed since the version that it was made from."""
        if self.current.version != expected or configuration.version <= expected:
            return False
        return self._take(configuration)

    def override(self, model: str, keys: Mapping[str, Any] | None) -> bool:
        """Lay engine keys over a model's own for its present load; None ends that. Raises `ConfigError`."""
        if dict(self.current.overrides.get(model, {})) == dict(keys or {}):
            return False
        if keys:
            overridden(self.current.pool.models[model], keys)
        return self._take(with_overrides(self.current, model, keys))

    def load(self, model: str, devices: tuple[int, ...]) -> Load:
        """The order to load a model as it is configured now. Its overrides are laid over `config` already."""
        spec = self.spec.models[model]
        overrides = dict(self.current.overrides.get(model, {}))
        config = self.current.pool.models[model]
        if overrides:
            config = overridden(config, overrides)
        fields = self.current.pool.model_in_pool(config).model_dump(mode="json", by_alias=False)
        kv_store = self.current.pool.kv_store if config.remembers else None
        return Load(model, fields, overrides, devices, spec.revision, spec.num_gpus, spec.slots, kv_store)

    def _take(self, configuration: Configuration) -> bool:
        if configuration.version == self.current.version:
            return False
        configuration = fitting(configuration)
        self.spec = pool_spec(configuration)
        self.current = configuration
        return True


def fitting(configuration: Configuration) -> Configuration:
    """The configuration without overrides that its models, which have changed meanwhile, no longer take."""
    kept = {}
    for name, keys in configuration.overrides.items():
        try:
            overridden(configuration.pool.models[name], keys)
        except (KeyError, ConfigError) as error:
            logger.warning("the overrides of %s end, for its configuration has changed: %s", name, error)
        else:
            kept[name] = keys
    return configuration._replace(overrides=kept)


def pool_spec(configuration: Configuration) -> PoolSpec:
    """The pool as the ledger sees it: a model with overrides for its present load has a revision of its own."""
    spec = configuration.pool.spec()
    models = dict(spec.models)
    for name, keys in configuration.overrides.items():
        if name in models:
            revision = overridden(configuration.pool.models[name], keys).revision
            models[name] = dataclasses.replace(models[name], revision=revision)
    return dataclasses.replace(spec, models=models)
