"""What holds an answer of llama.cpp to a format: a grammar in its own notation (GBNF)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import InvalidRequest
from deployments.engines.chat.prepare import Preparer, check_one_format
from deployments.engines.chat.request import GenerationOptions
from deployments.engines.chat.tools import CLOSE, OPEN, ToolPlan
from deployments.engines.llama_cpp.library import schema_to_grammar


class LlamaPreparer(Preparer):
    """Prepares calls for one loaded model."""

    def _grammar(self, body: Mapping[str, Any], options: GenerationOptions, plan: ToolPlan) -> str | None:
        form = options.response_format
        own: str | None = body.get("grammar")
        check_one_format(own, options, plan)
        if own is not None:
            return own
        if plan.mode == "forced":
            call = _compiled(plan.grammar_schema(), "tools")
            # The converter's rule for the whole schema is `root`; a call stands between the tags.
            inner = "\n".join("call" + line[4:] if line.startswith("root ") else line for line in call.splitlines())
            return f'root ::= "{OPEN}\\n" call "\\n{CLOSE}"\n{inner}'
        if form.kind == "json_object":
            return _compiled({"type": "object"}, "response_format")
        if form.kind == "json_schema":
            return _compiled(form.schema or {}, "response_format")
        return None


def _compiled(schema: Mapping[str, Any], param: str) -> str:
    # The library's converter asserts, recurses and looks up keys without checks of its own.
    failures = (AssertionError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError)
    convert: Callable[[str], str] = schema_to_grammar
    try:
        return convert(json.dumps(schema))
    except failures as error:
        raise InvalidRequest(f"the JSON schema cannot be turned into a grammar: {error}", param=param) from error
