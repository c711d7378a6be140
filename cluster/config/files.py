"""The files that a pool is configured from, each in its own shape, as keys of the one schema (CONTRACT section 8).

    pool.yaml, or any other     the schema's own keys; `.json` as well
    settings.json, local.json   `service`, `engine.models.<id>` and other keys of the pool under `engine`; local wins
    models.yaml                 a list of models under `models`, or at the top

What a shape means is told here and nowhere else. Raises `ConfigError` for what cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

#: More files, by the environment variable that holds their path; `local` is laid over the settings.
SETTINGS, LOCAL, MODELS = "LLM_POOL_SETTINGS_PATH", "LLM_POOL_LOCAL_SETTINGS_PATH", "MODELS_CONFIG_PATH"
#: The backend of a format that a list of models names without one.
BACKEND_OF_FORMAT = {"gguf": "llama_cpp", "hf": "vllm", "awq": "vllm"}


#: A backend that runs nothing here, so it wants no device.
REMOTE = "openai_compatible"


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file, the path of the key and what is wrong."""


class Service(NamedTuple):
    """Where the pool listens, as its settings say; None where they do not."""

    host: str | None = None
    port: int | None = None
    log_level: str | None = None


class Source(NamedTuple):
    """The keys of one file. A file is called by its name only, since an operator far away hears of it, too."""

    name: str
    keys: dict[str, Any]
    service: Service = Service()


def read_source(path: Path, environ: Mapping[str, str] = {}) -> Source:
    """One file in whatever shape it has; settings with the local file that is laid over them."""
    data = _parsed(path)
    models = data.get("models") if isinstance(data, dict) else data
    if isinstance(models, list):
        return Source(path.name, {"models": _listed(path.name, models)})
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name}: expected a mapping at the top")
    if "engine" not in data and "service" not in data:
        return Source(path.name, data)
    local = Path(environ[LOCAL]).expanduser() if LOCAL in environ else path.with_name("local.json")
    if LOCAL in environ or local.is_file():
        data = _merged(data, read_yaml(local))
    return _settings(path.name, data)


def more_sources(environ: Mapping[str, str], known: Path | None) -> Iterator[Source]:
    """The files that the environment names beside the one that is known already."""
    for variable in (SETTINGS, MODELS):
        if variable in environ:
            path = Path(environ[variable]).expanduser()
            if known is None or path.resolve() != known.resolve():
                yield read_source(path, environ)


def joined(sources: list[Source]) -> dict[str, Any]:
    """The keys of all files; the first that has a key wins. A model that stands in two of them is a mistake."""
    keys: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for source in sources:
        models = source.keys.get("models")
        for model in models if isinstance(models, dict) else ():
            if model in owners:
                raise ConfigError(f"the model {model!r} stands in {owners[model]} and in {source.name}")
            owners[model] = source.name
        known = keys.get("models")
        keys = {**source.keys, **keys}
        if isinstance(known, dict) and isinstance(models, dict):
            keys["models"] = {**known, **models}
    return keys


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping."""
    data = _parsed(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name}: expected a mapping at the top")
    return data


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path.name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name}: line {error.lineno}: not JSON: {error.msg}") from None
    except yaml.YAMLError as error:
        # Not the whole message, which quotes the line: there may be a key in it.
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}: line {mark.line + 1}" if mark else path.name
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None


def _merged(base: Any, local: Any) -> Any:
    """`local` laid over `base`, mapping by mapping."""
    if not (isinstance(base, dict) and isinstance(local, dict)):
        return local
    return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in local.items()}}


def _settings(name: str, data: dict[str, Any]) -> Source:
    service, engine = data.pop("service", None) or {}, data.pop("engine", None) or {}
    if not isinstance(service, dict) or not isinstance(engine, dict):
        raise ConfigError(f"{name}: service and engine must be mappings")
    unknown = sorted(set(service) - set(Service._fields))
    if unknown:
        raise ConfigError(f"{name}: service.{unknown[0]}: unknown key, there are {', '.join(Service._fields)}")
    backend = engine.pop("backend", None)
    models = engine.get("models")
    if backend is not None and isinstance(models, dict):
        engine["models"] = {
            model: {"backend": backend, **keys} if isinstance(keys, dict) else keys for model, keys in models.items()
        }
    if not isinstance(service.get("port", 1), int) or not isinstance(service.get("host", ""), str):
        raise ConfigError(f"{name}: service: host must be a string, and port a number")
    return Source(name, {**data, **engine}, Service(**service))


def _listed(name: str, models: list[Any]) -> dict[str, Any]:
    """A list of models as a map of them."""
    found: dict[str, Any] = {}
    for index, given in enumerate(models):
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise ConfigError(f"{name}: models.{index}: a mapping with a name is expected")
        model = given["name"]
        if model in found:
            raise ConfigError(f"{name}: models.{index}: the model {model!r} stands there twice")
        found[model] = _one_of_list(f"{name}: models.{index}", given)
    return found


def _one_of_list(where: str, given: dict[str, Any]) -> dict[str, Any]:
    # The port was that of the model's own server; the pool finds its engines by itself.
    keys = {key: value for key, value in given.items() if key not in ("name", "port", "gpu_id")}
    mode = keys.pop("execution_mode", "gpu")
    if mode not in ("gpu", "cpu"):
        raise ConfigError(f"{where}.execution_mode: {mode!r} is neither gpu nor cpu")
    kind = given.get("format")
    if kind is not None:
        if kind not in BACKEND_OF_FORMAT:
            raise ConfigError(f"{where}.format: {kind!r} is none of {', '.join(BACKEND_OF_FORMAT)}")
        keys.setdefault("backend", BACKEND_OF_FORMAT[kind])
    if keys.get("backend") == REMOTE:
        mode = "cpu"
    keys.setdefault("num_gpus", 1 if mode == "gpu" else 0)
    if given.get("gpu_id") is not None and keys["num_gpus"]:
        keys["gpu"] = given["gpu_id"]
    return keys
