"""The configuration as a page for people, made of the same JSON schema that editors read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config.files import LOCAL, MODELS, SETTINGS
from cluster.config.load import ENVIRONMENT
from cluster.config.models import DEFAULT_BACKEND, SCHEDULING_KEYS, ModelConfig

Json = dict[str, Any]

HEAD = """\
# Configuration reference

Every key, made from the schema that reads it (`make docs`); do not edit this page. How to begin, with examples:
[models.md](models.md) and [keys.md](keys.md). For editors: `# yaml-language-server: $schema=`
[`config.schema.json`](config.schema.json).

The keys stand at the top of a file (`slotpool serve pool.yaml`), or under `applications[0].args` of
[`serve_config.yaml`](../serve_config.yaml). An unknown key is refused, with the nearest known one. Times are in
seconds, memory is in MiB.
"""
#: The schemas in the order of the page, each with its heading.
POOL_SECTIONS = {
    "PoolConfig": "The pool",
    "MaxWait": "`max_wait_s`",
    "ServerEntry": "One of `servers`",
    "ApiKey": "One of `api_keys` and `admin_keys`",
    "Budget": "`budget` of a key",
    "StoreConfig": "`store`",
    "Decoding": "`decoding`",
}
MODEL_SECTIONS = {"Group": "`group` of a model", "Price": "`price` of a model"}


def markdown(schema: Json) -> str:
    """The page. `schema` is that of a pool's file."""
    return "\n".join(_blocks(schema["$defs"])).rstrip("\n") + "\n"


def _blocks(definitions: Json) -> Iterator[str]:
    headings = POOL_SECTIONS | MODEL_SECTIONS | {"ModelConfig": "A model"}
    for backend in _backends():
        for extra, key in _extras(definitions, backend).items():
            headings[extra] = f"`{key}` of {_title(backend)}"
    yield HEAD
    for name, heading in POOL_SECTIONS.items():
        yield from _section("##", heading, definitions[name], headings)
    yield from _section("##", headings["ModelConfig"], _any_model(definitions), headings)
    for name, heading in MODEL_SECTIONS.items():
        yield from _section("##", heading, definitions[name], headings)
    for backend in _backends():
        yield from _section("##", _title(backend), definitions[backend.__name__], headings, only=_own_keys(backend))
        for spelling in _names(backend)[1:]:
            yield f"It may also be written `{spelling}`.\n"
        for extra in _extras(definitions, backend):
            yield from _section("###", headings[extra], definitions[extra], headings)
    yield from _environment()
    yield from _without_reload()


def _backends() -> list[Any]:
    """Their classes: the default first, and last the one that is for trying things."""
    classes = dict.fromkeys(ModelConfig.backends.values())
    return sorted(classes, key=lambda each: (_names(each)[0] != DEFAULT_BACKEND, _names(each)[0] == "fake"))


def _names(backend: Any) -> list[str]:
    return [name for name, each in ModelConfig.backends.items() if each is backend]


def _title(backend: Any) -> str:
    return f"`backend: {_names(backend)[0]}`"


def _any_model(definitions: Json) -> Json:
    """What models have whatever their backend is."""
    properties = definitions[_backends()[0].__name__]["properties"]
    common = {name: properties[name] for name in ModelConfig.model_fields}
    common["backend"] = {**common["backend"], "enum": list(ModelConfig.backends)}
    return {"description": ModelConfig.__doc__ or "", "properties": common}


def _own_keys(backend: Any) -> list[str]:
    """The keys that only models of this backend have."""
    return [key for key in backend.model_fields if key not in ModelConfig.model_fields]


def _extras(definitions: Json, backend: Any) -> dict[str, str]:
    """The schemas that a backend's own keys use, each with the key."""
    found: dict[str, str] = {}
    for key in _own_keys(backend):
        for name in re.findall(r"#/\$defs/(\w+)", json.dumps(definitions[backend.__name__]["properties"][key])):
            if "properties" in definitions[name]:
                found.setdefault(name, key)
    return found


def _section(
    level: str, heading: str, definition: Json, headings: Mapping[str, str], only: list[str] | None = None
) -> Iterator[str]:
    yield f"{level} {heading}\n"
    paragraphs = definition["description"].removeprefix(heading).lstrip(".: ").split("\n\n")
    yield "".join(" ".join(each.split()) + "\n\n" for each in paragraphs if each).rstrip("\n") + "\n"
    properties = definition["properties"]
    rows = [name for name in only or properties if name in properties]
    if not rows:
        yield "No keys of its own.\n"
        return
    yield "| key | value | default | |\n|---|---|---|---|"
    for name in rows:
        yield _row(name, properties[name], name in definition.get("required", ()), headings)
    yield ""


def _row(name: str, value: Json, is_required: bool, headings: Mapping[str, str]) -> str:
    field = ModelConfig.model_fields.get(name)
    names = f"`{name}`" if field is None or not field.alias else f"`{field.alias}`, `{name}`"
    default = "required" if is_required else _default(value)
    cells = (names, _kind(value, headings), default, value.get("description", ""))
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def _default(value: Json) -> str:
    default = value.get("default")
    if default is None or default in ({}, []) or isinstance(default, dict):
        return ""
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _kind(value: Json, headings: Mapping[str, str]) -> str:
    """What may stand there, in a few words."""
    if "$ref" in value:
        heading = headings.get(value["$ref"].rpartition("/")[2])
        return "any value" if heading is None else f"[{heading}](#{anchor(heading)})"
    if "allOf" in value:
        return _kind(value["allOf"][0], headings)
    if "anyOf" in value:
        kinds = dict.fromkeys(_kind(each, headings) for each in value["anyOf"] if each.get("type") != "null")
        *single, last = kinds
        text = ", or ".join(single)
        return f"{text}, or a list of them" if single and last == f"list of {text}" else ", or ".join(kinds)
    if "enum" in value or "const" in value:
        return ", ".join(f"`{each}`" for each in value.get("enum", [value.get("const")]))
    kind = value.get("type")
    if kind == "array":
        return f"list of {_kind(value['items'], headings)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"map to {_kind(inner, headings)}" if isinstance(inner, dict) and inner else "map"
    if isinstance(kind, list):
        return " or ".join(NAMES.get(str(each), str(each)) for each in kind)
    return NAMES.get(str(kind), "any value") + _bounds(value)


NAMES = {"string": "text", "boolean": "`true`, `false`", "integer": "whole number", "number": "number"}


def _bounds(value: Json) -> str:
    least, most = value.get("minimum"), value.get("maximum")
    if least is not None and most is not None:
        return f", {least:g} to {most:g}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    return "".join(f" {sign} {value[key]:g}" for key, sign in signs.items() if key in value)


def anchor(heading: str) -> str:
    """The anchor of a heading, as Markdown's readers make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _environment() -> Iterator[str]:
    yield "## Environment variables\n"
    yield "They win over the files.\n"
    yield "| variable | |\n|---|---|"
    for variable, key in sorted(ENVIRONMENT.items()):
        yield f"| `{variable}` | `{key}` |"
    yield "| `INFERENCE_GPU_COUNT` | the logical GPUs that `slotpool serve` declares (`--gpus`) |"
    yield "| `ROUTER_HOST`, `ROUTER_PORT` | where the pool listens |"
    yield f"| `{SETTINGS}`, `{LOCAL}`, `{MODELS}` | more files to read: [models.md](models.md#several-files) |"
    yield ""


def _without_reload() -> Iterator[str]:
    yield "## What changes without a reload\n"
    keys = ", ".join(f"`{key}`" for key in SCHEDULING_KEYS)
    yield f"A change of these keys of a model ([admin.md](admin.md#models-at-run-time)) restarts nothing: {keys}.\n"
    yield "Any other key loads the model anew, once its streams have ended."
