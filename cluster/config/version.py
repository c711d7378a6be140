"""The pool's configuration as the ledger holds it: versioned, and changed at run time one model at a time.

Pure: every function gives a new `Configuration` or raises `ConfigError`, and never changes the one it was given. The
ledger keeps the greatest version that it was told; ingresses follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from cluster.config.files import ConfigError
from cluster.config.load import checked
from cluster.config.models import ModelConfig
from cluster.config.names import deployments_collide
from cluster.config.pool import PoolConfig
from cluster.config.relayed import RemoteModel, ServerKwargs, ServerModel, SglangModel
from cluster.config.share import share_of

#: A longer id does not fit into the names of sockets, actors and applications.
LONGEST_ID = 200
#: Where the keys of a change come from, for people.
REQUEST = "request"


class IdTaken(ConfigError):
    """A model cannot be registered: its id is the id, an alias or the public name of another."""


class NoSuchModel(ConfigError):
    """The configuration has no model of this id."""

    def __init__(self, model: str) -> None:
        super().__init__(f"the model {model!r} does not exist")
        self.model = model


class Configuration(NamedTuple):
    """`version` is the time of the deploy and the serial number of the changes made at run time on it; greater wins.

    `runtime` are the ids of the models that live in Serve applications of their own, because the graph that was
    deployed has no deployment for them, or not one of this size. `overrides` are engine keys by model id that hold for
    its present load only. `registered` are the ids of the models that were registered by a request: no file names
    them, so no file takes them away.
    """

    version: tuple[float, int]
    pool: PoolConfig
    runtime: frozenset[str] = frozenset()
    overrides: Mapping[str, Mapping[str, Any]] = {}
    registered: frozenset[str] = frozenset()


def with_model(configuration: Configuration, model: str, keys: Mapping[str, Any]) -> Configuration:
    """The next version, with one model more. Raises `IdTaken` or another `ConfigError`; there is a line per mistake."""
    pool = configuration.pool
    if not model or len(model) > LONGEST_ID or not model.isprintable():
        raise ConfigError(f"id: 1 to {LONGEST_ID} printable characters are needed")
    if model in pool.names.targets:
        raise IdTaken(f"the id {model!r} is taken")
    changed = _with_models(pool, {**pool.models, model: dict(keys)})
    _check_interpreter(pool, changed.models[model])
    return _next(
        configuration,
        changed,
        runtime=configuration.runtime | {model},
        registered=configuration.registered | {model},
    )


def without_model(configuration: Configuration, model: str) -> Configuration:
    """The next version, without one model. Raises `ConfigError` where another key names it."""
    pool = configuration.pool
    _existing(pool, model)
    if pool.default_model and pool.names.targets.get(pool.default_model) == model:
        raise ConfigError(f"default_model: {pool.default_model!r} is this model")
    changed = _with_models(pool, {name: each for name, each in pool.models.items() if name != model})
    return _next(configuration, changed)


def patched(configuration: Configuration, model: str, keys: Mapping[str, Any]) -> Configuration:
    """The next version, with some keys of one model changed; None sets a key back to its default.

    A model whose replicas will take another amount of Ray's books moves into an application of its own.
    """
    pool = configuration.pool
    before = _existing(pool, model)
    fields = _patched_fields(before, keys)
    changed = _with_models(pool, {**pool.models, model: fields})
    after = changed.models[model]
    _check_interpreter(pool, after)
    moves = share_of(pool, after) != share_of(pool, before)
    runtime = configuration.runtime | {model} if moves else configuration.runtime
    return _next(configuration, changed, runtime=runtime)


def with_overrides(configuration: Configuration, model: str, keys: Mapping[str, Any] | None) -> Configuration:
    """The next version, in which these engine keys are laid over a model's own for its next load; None ends that."""
    overrides = {name: each for name, each in configuration.overrides.items() if name != model}
    if keys:
        overrides[model] = dict(keys)
    return _next(configuration, configuration.pool)._replace(overrides=overrides)


def overridden(model: ModelConfig, keys: Mapping[str, Any]) -> ModelConfig:
    """One model as a load with these engine keys runs it; an explicit None is the engine's own default."""
    fields = {name: each for name, each in _patched_fields(model, keys).items() if name not in _REFERENCES}
    alone = checked({"models": {"model": fields}}, REQUEST).models["model"]
    return alone.model_copy(update={name: getattr(model, name) for name in _REFERENCES})


def reloaded(configuration: Configuration, pool: PoolConfig) -> Configuration:
    """The next version, from a configuration file that was read again: the file wins for every model that it names.

    What was registered by a request and is not in the file stays. Models that are new in the file, or whose replicas
    will take another amount of Ray's books, move into applications of their own. Whether replicas stay without their
    engines is for a deploy to change.
    """
    before = configuration.pool
    if (pool.max_asleep == 0) != (before.max_asleep == 0):
        raise ConfigError("max_asleep: from 0, or to 0, by a new deploy only")
    merged, registered = _with_registered(pool, configuration)
    runtime = set(configuration.runtime)
    for name, model in merged.models.items():
        known = before.models.get(name)
        if known is None or share_of(pool, known) != share_of(pool, model):
            runtime.add(name)
    return _next(configuration, merged, runtime=frozenset(runtime), registered=registered)


def merged(one: Configuration, other: Configuration) -> Configuration:
    """What is in force where two configurations meet: the newer, and in a fresh deploy what was registered before.

    A deploy that nobody has changed yet (serial 0) takes over the models that requests had registered, so they last as
    long as the pool; ids that it names itself are its own. Both orders of the arguments give the same.
    """
    older, newer = sorted((one, other), key=lambda each: each.version)
    if newer.version[1] or newer.version[0] == older.version[0]:
        return newer
    pool, registered = _with_registered(newer.pool, older)
    # A model that has an application keeps it, also where the graph could serve it: the application is running.
    runtime = frozenset(name for name in older.runtime if name in pool.models)
    overrides = {name: each for name, each in older.overrides.items() if name in pool.models}
    return Configuration((newer.version[0], 1), pool, runtime, overrides, registered)


#: Keys that name other models or the model itself; they lead nowhere from a model that is looked at alone.
_REFERENCES = ("aliases", "cpu_offload_model", "fallbacks", "weight", "group")


def _existing(pool: PoolConfig, model: str) -> ModelConfig:
    if model not in pool.models:
        raise NoSuchModel(model)
    return pool.models[model]


def _check_interpreter(before: PoolConfig, model: ModelConfig) -> None:
    """A model that comes or changes by a request runs no file of the machine that the pool does not run already.

    Nor does it send a key to where the pool does not send it already.
    """
    _check_command(before, model)
    if isinstance(model, RemoteModel) and model.remote_api_key_env is not None:
        known = [each for each in before.models.values() if isinstance(each, RemoteModel)]
        sent = {(each.remote_api_key_env, each.remote_base_url) for each in known}
        if (model.remote_api_key_env, model.remote_base_url) not in sent:
            raise ConfigError("remote_api_key_env: by a request only a key that another model sends to the same URL")
    if model.python is not None and model.python not in {each.python for each in before.models.values()}:
        raise ConfigError("python: by a request only an interpreter that another model has; a file may name any")


def _check_command(before: PoolConfig, model: ModelConfig) -> None:
    """A command, its arguments and its environment can be anything, so they are those of another model."""
    if not isinstance(model, ServerModel | SglangModel):
        return
    given = model.engine_kwargs
    is_plain = not (given.args or given.env or (isinstance(given, ServerKwargs) and given.command))
    known = [each.engine_kwargs for each in before.models.values() if isinstance(each, ServerModel | SglangModel)]
    if not is_plain and given not in known:
        raise ConfigError("engine_kwargs: by a request only a command that another model has; a file may name any")


def _patched_fields(model: ModelConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What was configured of a model, with some keys changed; either spelling of a key will do."""
    fields = {name: _written(getattr(model, name)) for name in model.model_fields_set}
    known = type(model).model_fields
    names = {field.alias: name for name, field in known.items() if field.alias}
    seen: dict[str, str] = {}
    for key, value in keys.items():
        name = names.get(key, key)
        if name in seen:
            raise ConfigError(f"{key}: is another name of {seen[name]!r}; give one of them")
        seen[name] = key
        if value is None and name in known:
            fields.pop(name, None)
        else:
            fields[name] = value
    return fields


def _written(value: Any) -> Any:
    """A value as a configuration file has it: another backend may read it with another schema."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _with_models(pool: PoolConfig, models: Mapping[str, Any]) -> PoolConfig:
    """The pool with other models, checked as a whole; what is known of the unchanged ones is kept."""
    if deployments_collide(models):
        raise ConfigError("id: another model's differs only in characters that Ray Serve does not allow in a name")
    values = {name: getattr(pool, name) for name in pool.model_fields_set}
    changed = checked({**values, "models": dict(models)}, REQUEST)
    kept = {name: pool.estimate_mib(name) for name in changed.models if changed.models[name] == pool.models.get(name)}
    return changed.with_estimates({name: mib for name, mib in kept.items() if mib is not None})


def _with_registered(pool: PoolConfig, former: Configuration) -> tuple[PoolConfig, frozenset[str]]:
    """A pool that also has the models that requests had registered, but for those that no longer fit into it."""
    registered = set()
    for name in sorted(former.registered):
        if name in pool.names.targets or name not in former.pool.models:
            continue
        try:
            estimate = former.pool.estimate_mib(name)
            known = {each: mib for each in pool.models if (mib := pool.estimate_mib(each)) is not None}
            pool = _with_models(pool, {**pool.models, name: former.pool.models[name]})
            pool = pool.with_estimates(known if estimate is None else {**known, name: estimate})
        except ConfigError:
            continue
        registered.add(name)
    return pool, frozenset(registered)


def _next(
    configuration: Configuration,
    pool: PoolConfig,
    runtime: frozenset[str] | None = None,
    registered: frozenset[str] | None = None,
) -> Configuration:
    deployed, serial = configuration.version
    kept = configuration.runtime if runtime is None else runtime
    requested = configuration.registered if registered is None else registered
    return Configuration(
        (deployed, serial + 1),
        pool,
        frozenset(name for name in kept if name in pool.models),
        {name: each for name, each in configuration.overrides.items() if name in pool.models},
        frozenset(name for name in requested if name in pool.models),
    )
