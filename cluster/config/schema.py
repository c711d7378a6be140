"""The configuration as a JSON schema, for editors. `python -m cluster.generated docs` writes the two files."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.config.meanings import meanings, parts
from cluster.config.models import DEFAULT_BACKEND, ModelConfig
from cluster.config.pool import PoolConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: The files by their names: of a pool's own configuration, and of Serve's with the pool's in it.
POOL, SERVE = "config.schema.json", "serve_config.schema.json"
_TEXT = {"type": "string"}


def schemas() -> dict[str, dict[str, Any]]:
    """Each file's content."""
    backends = list(dict.fromkeys(ModelConfig.backends.values()))
    kinds: list[Any] = [PoolConfig, *backends]
    _, made = models_json_schema([(kind, "validation") for kind in kinds])
    definitions = made["$defs"]
    definitions["ModelConfig"] = {"anyOf": [{"$ref": f"#/$defs/{backend.__name__}"} for backend in backends]}
    # A single device, a group's name and an adapter's path stand for themselves; a line may be a text or its words.
    for name in ("ServerKwargs", "SglangKwargs"):
        for key in {"command", "args"} & set(definitions[name]["properties"]):
            definitions[name]["properties"][key] = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
    adapter = {"anyOf": [_TEXT, {"$ref": "#/$defs/LoraAdapter"}]}
    definitions["LlamaCppModel"]["properties"]["gguf_lora"] = {
        "anyOf": [*adapter["anyOf"], {"type": "array", "items": adapter}]
    }
    for backend in backends:
        properties = definitions[backend.__name__]["properties"]
        properties["gpu"] = {
            "anyOf": [{"type": ["integer", "string"]}, {"type": "array", "items": {"type": ["integer", "string"]}}]
        }
        properties["group"] = {"anyOf": [{"type": "string"}, properties["group"]]}
    for kind in kinds:
        for part in parts(kind):
            if part is not ModelConfig:
                _describe(part, definitions[part.__name__]["properties"])
    for backend in backends:
        entry = definitions[backend.__name__]
        for name, field in backend.model_fields.items():
            if field.alias:
                entry["properties"][name] = entry["properties"][field.alias]
        if ModelConfig.backends[DEFAULT_BACKEND] is not backend:
            entry["required"] = [*entry.get("required", ()), "backend"]
    # So does the text of a key, which is a digest, and has a name, only when the schema sees it.
    definitions["ApiKey"]["properties"]["key"].pop("pattern", None)
    definitions["ApiKey"]["required"].remove("name")
    pool = definitions["PoolConfig"]
    for keys in ("api_keys", "admin_keys"):
        pool["properties"][keys]["items"] = {"anyOf": [{"type": "string"}, pool["properties"][keys]["items"]]}
    pool_file = {"$schema": DIALECT, "title": "Slotpool", "$ref": "#/$defs/PoolConfig", "$defs": definitions}
    args = {"anyOf": [_config_path(), {"$ref": POOL}]}
    application = {"type": "object", "properties": {"args": args}}
    serve_file = {
        "$schema": DIALECT,
        "title": "Ray Serve, with Slotpool as its application",
        "type": "object",
        "properties": {"applications": {"type": "array", "items": application}},
        "required": ["applications"],
    }
    return {POOL: pool_file, SERVE: serve_file}


def _describe(part: type[BaseModel], properties: dict[str, Any]) -> None:
    for name, meaning in meanings(part).items():
        properties[part.model_fields[name].alias or name]["description"] = meaning


def _config_path() -> dict[str, Any]:
    config = {"type": "string", "description": "The pool's configuration file"}
    return {"type": "object", "properties": {"config": config}, "required": ["config"], "additionalProperties": False}


def text(schema: dict[str, Any]) -> str:
    """A file as it is written."""
    return json.dumps(schema, indent=1) + "\n"
