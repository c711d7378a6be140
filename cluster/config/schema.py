"""The configuration as a JSON schema, for editors: `python -m cluster.config.schema docs` writes the two files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from cluster.config.models import DEFAULT_BACKEND, ModelConfig
from cluster.config.pool import PoolConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: The files by their names: of a pool's own configuration, and of Serve's with the pool's in it.
POOL, SERVE = "config.schema.json", "serve_config.schema.json"


def schemas() -> dict[str, dict[str, Any]]:
    """Each file's content."""
    backends = list(dict.fromkeys(ModelConfig.backends.values()))
    kinds: list[Any] = [PoolConfig, *backends]
    _, made = models_json_schema([(kind, "validation") for kind in kinds])
    definitions = made["$defs"]
    definitions["ModelConfig"] = {"anyOf": [{"$ref": f"#/$defs/{backend.__name__}"} for backend in backends]}
    for backend in backends:
        entry = definitions[backend.__name__]
        for name, field in backend.model_fields.items():
            if field.alias:
                entry["properties"][name] = entry["properties"][field.alias]
        if ModelConfig.backends[DEFAULT_BACKEND] is not backend:
            entry["required"] = [*entry.get("required", ()), "backend"]
    # A single device, and a group's name, stand for themselves; so does a key's text.
    for backend in backends:
        properties = definitions[backend.__name__]["properties"]
        properties["gpu"] = {
            "anyOf": [{"type": ["integer", "string"]}, {"type": "array", "items": {"type": ["integer", "string"]}}]
        }
        properties["group"] = {"anyOf": [{"type": "string"}, properties["group"]]}
    # A key stands there as a digest only when the schema sees it; in a file it may be named or in clear.
    definitions["ApiKey"]["properties"]["key"].pop("pattern", None)
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


def _config_path() -> dict[str, Any]:
    config = {"type": "string", "description": "The pool's configuration file"}
    return {"type": "object", "properties": {"config": config}, "required": ["config"], "additionalProperties": False}


def text(schema: dict[str, Any]) -> str:
    """A file as it is written."""
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    for name, schema in schemas().items():
        Path(sys.argv[1], name).write_text(text(schema), encoding="utf-8")
