"""The OpenAPI document: FastAPI's own for its routes, and an entry for each plain ASGI route, from the very schema that
checks its bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.answers import family_of

REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
#: What clients of Anthropic's and of Ollama's read.
ERRORS = {
    "Error": ERROR,
    "MessagesError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
            "request_id": {"type": "string"},
        },
    },
    "OllamaError": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """A plain route as the document tells of it: a POST of a `schema`; `streams` is the type of its stream."""

    path: str
    tag: str
    summary: str
    schema: type[BaseModel]
    streams: str | None = None


def document(app: FastAPI, operations: Sequence[Operation]) -> Callable[[], dict[str, Any]]:
    """The function that makes the document, once, at the first request for it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            kinds = dict.fromkeys(operation.schema for operation in operations)
            names, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REF)
            schemas |= {**ERRORS, **definitions.get("$defs", {})}
            for operation in operations:
                made["paths"].setdefault(operation.path, {})["post"] = _entry(
                    operation, names[operation.schema, "validation"]
                )
            for path, methods in made["paths"].items():
                for entry in methods.values():
                    _with_errors(entry, family_of(path).schema)
            app.openapi_schema = made
        return app.openapi_schema

    return openapi


def _entry(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation.streams:
        content[operation.streams] = {}
    return {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": "post" + operation.path.replace("/", "_").replace("-", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def _with_errors(entry: dict[str, Any], shape: str) -> None:
    """Every route may refuse; all refusals of a family have one shape, so FastAPI's own for 422 does not hold."""
    entry["responses"].pop("422", None)
    error = {"schema": {"$ref": REF.format(model=shape)}}
    for status, why in (("4XX", "The request is refused"), ("5XX", "The pool or an engine failed")):
        entry["responses"].setdefault(status, {"description": why, "content": {"application/json": error}})
