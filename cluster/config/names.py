"""Names in a configuration and what they lead to: ids, aliases, public names of variants, and one model's mentions of
another. A name that leads nowhere is found when the pool starts, not when the first request needs it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.config.models import ModelConfig


@dataclass(frozen=True, slots=True)
class Names:
    """`targets` maps every name to a model's id, or to itself where it is the public name of `variants`.

    `variants` maps such a public name to its models with their weights.
    """

    targets: dict[str, str]
    variants: dict[str, tuple[tuple[str, float], ...]]

    @classmethod
    def of(cls, models: Mapping[str, ModelConfig]) -> Names:
        """The names of a set of models. Raises `ValueError` where one name would mean two things."""
        owners: dict[str, list[str]] = {}
        for model_id, model in models.items():
            for alias in dict.fromkeys(model.aliases):
                if alias in models:
                    raise ValueError(f"models.{model_id}.aliases: {alias!r} is already a model id")
                owners.setdefault(alias, []).append(model_id)
        targets = {model_id: model_id for model_id in models}
        variants = {}
        for alias, owned_by in owners.items():
            if len(owned_by) == 1:
                targets[alias] = owned_by[0]
                continue
            plain = [model_id for model_id in owned_by if models[model_id].weight is None]
            if plain:
                others = ", ".join(repr(each) for each in owned_by if each != plain[-1])
                raise ValueError(
                    f"models.{plain[-1]}.aliases: {alias!r} is already an alias of {others}; "
                    "models that share one as variants each need a weight"
                )
            targets[alias] = alias
            variants[alias] = tuple((each, float(models[each].weight or 0.0)) for each in owned_by)
        return cls(targets, variants)


def check_references(
    models: Mapping[str, ModelConfig], names: Names, default: str | None, *, on_cpu: bool, has_servers: bool
) -> None:
    """Raise `ValueError` with the path of the first key that names a model which it cannot name.

    `default` is the pool's `default_model`. With external servers a name that leads nowhere here may be a model of
    theirs: only the ledger knows.
    """
    if default is not None and default not in names.targets and not has_servers:
        raise ValueError(f"default_model: {_unknown(names, default)}")
    for model_id, model in models.items():
        if model.cpu_offload_model is not None:
            path = f"models.{model_id}.cpu_offload_model"
            target = _other_model(names, path, model_id, model.cpu_offload_model)
            if models[target].num_gpus and not on_cpu:
                raise ValueError(f"{path}: {target!r} runs on a GPU itself (num_gpus)")
            _insist_on_local(models, path, target)
        for name in model.fallbacks:
            if has_servers and name not in names.targets:
                continue
            path = f"models.{model_id}.fallbacks"
            _insist_on_local(models, path, _other_model(names, path, model_id, name))
    for name, members in names.variants.items():
        for member, _ in members:
            _insist_on_local(models, f"models.{member}.aliases: {name!r}", member)
    _check_groups(models)


def _insist_on_local(models: Mapping[str, ModelConfig], path: str, target: str) -> None:
    """No request goes to a remote API by any other name than that model's own: it costs money, and must be allowed."""
    if models[target].is_remote:
        raise ValueError(f"{path}: {target!r} is remote, and used only by requests that name it and allow_remote")


def _other_model(names: Names, path: str, model_id: str, name: str) -> str:
    target = names.targets.get(name)
    if target is None:
        raise ValueError(f"{path}: {_unknown(names, name)}")
    if target == model_id:
        raise ValueError(f"{path}: {name!r} is the model itself")
    if target in names.variants:
        raise ValueError(f"{path}: {name!r} is the public name of several variants; name one of them")
    return target


def _unknown(names: Names, name: str) -> str:
    near = difflib.get_close_matches(name, names.targets, n=1)
    return f"{name!r} is not a configured model" + (f", did you mean {near[0]!r}?" if near else "")


def _check_groups(models: Mapping[str, ModelConfig]) -> None:
    rules: dict[str, tuple[str, str]] = {}
    for model_id, model in models.items():
        if model.group is None:
            continue
        first, devices = rules.setdefault(model.group.name, (model_id, model.group.devices))
        if devices != model.group.devices:
            raise ValueError(
                f"models.{model_id}.group: {model.group.name!r} is {devices!r} in models.{first} "
                f"and {model.group.devices!r} here"
            )


def deployment_name(model: str) -> str:
    """The Serve deployment of a model. Serve uses `#` and `/` in names of its own, so those are replaced."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "-", model)


def deployments_collide(models: Iterable[str]) -> bool:
    """Whether two ids differ only in characters that Ray Serve does not allow in a name."""
    names = [deployment_name(model) for model in models]
    return len(set(names)) < len(names)
