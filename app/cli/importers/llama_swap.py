"""llama-swap's `config.yaml`: models that are commands, with groups, macros and times to live."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from app.cli.importers import llama_server
from app.cli.importers.draft import Draft, Key, Source, hashed, mapping
from cluster.config import ConfigError

#: Macros that llama-swap fills in itself, and so does a model of `backend: server`.
OWN_MACROS = frozenset(("PORT", "MODEL_ID"))
_MACRO = re.compile(r"\$\{([^}]+)\}")
TOP = frozenset(("models", "groups", "macros", "healthCheckTimeout", "globalTTL", "hooks", "apiKeys"))
MODEL = frozenset(
    ("cmd", "proxy", "aliases", "env", "ttl", "macros", "checkEndpoint", "useModelName", "concurrencyLimit")
)
NOT_NEEDED = "not needed: the pool does this by itself"
REASONS = {
    "startPort": "not needed: the pool finds free ports itself",
    "logLevel": "not carried over: service.log_level of a settings file",
    "logToStdout": NOT_NEEDED,
    "logTimeFormat": NOT_NEEDED,
    "metricsMaxInMemory": "not needed: GET /metrics",
    "captureBuffer": "not carried over: requests are not kept",
    "sendLoadingState": "not needed: streams that wait say where, always",
    "includeAliasesInList": NOT_NEEDED,
    "profiles": "not carried over: models stay together as long as there is room",
    "peers": "not carried over: name them under servers",
    "cmdStop": "not carried over: the pool ends the processes of a command itself",
    "filters": "not carried over: what a client asks for is honoured or refused",
    "name": "not carried over: a model is shown by its id",
    "description": "not carried over: a model is shown by its id",
    "unlisted": "not carried over: every model is listed",
    "metadata": "not carried over: Slotpool has nothing like it",
}


def convert(source: Source) -> Draft:
    """The pool that does what this configuration of llama-swap does. Raises `ConfigError` where it is none."""
    data = source.mapping()
    models = data.get("models")
    if not isinstance(models, dict):
        raise ConfigError(f"{source.path.name}: there are no models in it")
    draft = Draft(source)
    draft.drop((), data, REASONS, TOP)
    # There a model stays until another one comes, unless it has a time to live.
    draft.pool["default_idle_timeout"] = max(0, _number(data.get("globalTTL")) or 0)
    if (timeout := _number(data.get("healthCheckTimeout"))) is not None:
        draft.pool["startup_timeout"] = timeout
    macros = mapping(data.get("macros"))
    for name, given in models.items():
        _model(draft, str(name), mapping(given), macros)
    _groups(draft, mapping(data.get("groups")))
    _hooks(draft, mapping(data.get("hooks")))
    if data.get("apiKeys"):
        draft.pool["api_keys"] = [_key(index, str(key)) for index, key in enumerate(data["apiKeys"], 1)]
        draft.note(("apiKeys",), "kept as digests; they are called key-1, key-2, …")
    return draft


def _model(draft: Draft, name: str, given: Mapping[str, Any], macros: Mapping[str, Any]) -> None:
    where: Key = ("models", name)
    words = _words(str(given.get("cmd") or ""), {**macros, **mapping(given.get("macros")), "MODEL_ID": name})
    draft.drop(where, given, REASONS, MODEL)
    if llama_server.is_llama_server(words):
        keys = _of_llama_server(draft, where, words, given)
    elif words:
        keys = _of_command(draft, where, words, given)
    else:
        keys = None
        _server(draft, (*where, "proxy"), given)
    if keys is None:
        return
    if given.get("aliases"):
        keys["aliases"] = list(dict.fromkeys([*keys.get("aliases", []), *map(str, given["aliases"])]))
    ttl = _number(given.get("ttl"))
    if ttl is not None and ttl >= 0:
        keys["idle_timeout"] = ttl
    draft.models[name] = keys


def _of_llama_server(draft: Draft, where: Key, words: list[str], given: Mapping[str, Any]) -> dict[str, Any] | None:
    reading = llama_server.read(words)
    keys = reading.keys
    for flag, message in reading.notes:
        line = draft.source.line_with(flag, *where, "cmd")
        draft.note_at(line, ".".join(map(str, (*where, "cmd", flag))), message)
    if "model_path" not in keys:
        draft.note((*where, "cmd"), "not carried over: the command names no model")
        return None
    for variable, value in _environment(given).items():
        if variable == "CUDA_VISIBLE_DEVICES" and keys["num_gpus"]:
            keys["gpu"] = [each.strip() for each in value.split(",") if each.strip()]
            keys["num_gpus"] = max(1, len(keys["gpu"]))
        else:
            draft.note((*where, "env"), f"{variable} is not carried over: engines have the pool's environment")
    for name in ("checkEndpoint", "useModelName"):
        if name in given:
            draft.note((*where, name), NOT_NEEDED)
    if "concurrencyLimit" in given:
        draft.note((*where, "concurrencyLimit"), "not carried over: target_inflight is how many run at a time")
    return keys


def _of_command(draft: Draft, where: Key, words: list[str], given: Mapping[str, Any]) -> dict[str, Any] | None:
    if "${PORT}" not in " ".join(words):
        draft.note((*where, "cmd"), "its port is fixed, so the pool does not start it: start it yourself")
        _server(draft, (*where, "proxy"), given)
        return None
    kwargs: dict[str, Any] = {"command": words}
    if environment := _environment(given):
        kwargs["env"] = environment
    if given.get("useModelName"):
        kwargs["served_model"] = str(given["useModelName"])
    check = given.get("checkEndpoint")
    if check == "none":
        draft.note((*where, "checkEndpoint"), "not carried over: the pool must see when a server serves")
    elif check:
        kwargs["ready_path"] = str(check)
    keys: dict[str, Any] = {"backend": "server", "num_gpus": 1, "engine_kwargs": kwargs}
    draft.note((*where, "cmd"), "taken to need one GPU: say with num_gpus what it takes")
    if (limit := _number(given.get("concurrencyLimit"))) is not None and limit > 0:
        keys["target_inflight"] = int(limit)
    return keys


def _server(draft: Draft, where: Key, given: Mapping[str, Any]) -> None:
    """Of what the pool does not start, it may still use the slots."""
    url = str(given.get("proxy") or "")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or "${" in url:
        draft.note(where, "not carried over: there is no command that could be started, and no server")
        return
    draft.add_server({"url": url.rstrip("/"), "max_concurrent": int(_number(given.get("concurrencyLimit")) or 1)})
    draft.note(where, "an external server: its models are called as it calls them")


def _groups(draft: Draft, groups: Mapping[str, Any]) -> None:
    for name, raw in groups.items():
        group, where = mapping(raw), ("groups", str(name))
        members = [each for each in map(str, group.get("members") or ()) if each in draft.models]
        for member in members:
            if group.get("persistent"):
                draft.models[member]["pinned"] = True
            if group.get("swap", True) and draft.models[member].get("num_gpus"):
                draft.models[member]["group"] = str(name)
        if group.get("swap", True):
            draft.note((*where, "swap"), "no two of them on one device; on several devices they may run together")
        if group.get("exclusive", True):
            draft.note((*where, "exclusive"), "not carried over: other models stay as long as there is room")
        draft.drop(where, group, {}, frozenset(("swap", "exclusive", "persistent", "members")))


def _hooks(draft: Draft, hooks: Mapping[str, Any]) -> None:
    startup = mapping(hooks.get("on_startup"))
    for name in map(str, startup.get("preload") or ()):
        if name in draft.models:
            draft.models[name]["enabled"] = True
    draft.drop(("hooks",), hooks, {}, frozenset(("on_startup",)))
    draft.drop(("hooks", "on_startup"), startup, {}, frozenset(("preload",)))


def _words(command: str, macros: Mapping[str, Any]) -> list[str]:
    """A command's words; macros may hold others, and lines of comments and ends of lines mean nothing."""
    lines = [line for line in command.splitlines() if not line.lstrip().startswith("#")]
    text = " ".join(line.rstrip().removesuffix("\\") for line in lines)
    for _ in range(10):
        filled = _MACRO.sub(lambda found: str(macros.get(found[1], found[0])), text)
        if filled == text:
            break
        text = filled
    text = _MACRO.sub(lambda found: _own(found[1]), text)
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _own(name: str) -> str:
    """A macro that nobody has filled in: those that the pool has as well stay."""
    return f"${{{name}}}" if name in OWN_MACROS else f"$${{{name}}}"


def _environment(given: Mapping[str, Any]) -> dict[str, str]:
    pairs = (str(each).partition("=") for each in given.get("env") or ())
    return {name: value for name, _, value in pairs}


def _key(index: int, key: str) -> dict[str, str]:
    variable = re.fullmatch(r"\$\{env\.(\w+)\}", key)
    return {"name": f"key-{index}", "key": f"env:{variable[1]}" if variable else hashed(key)}


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
