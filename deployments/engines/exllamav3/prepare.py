"""What holds an answer of ExLlamaV3 to a format: a grammar for llguidance, which the library brings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.engines.chat.hf_prepare import HfPreparer
from deployments.engines.chat.hf_vocabulary import HfVocabulary
from deployments.engines.chat.prepare import check_one_format
from deployments.engines.chat.request import GenerationOptions
from deployments.engines.chat.template import ChatTemplate
from deployments.engines.chat.tools import CLOSE, OPEN, ToolPlan


class ExllamaPreparer(HfPreparer):
    """Prepares calls for one loaded model. `check` makes a filter of a grammar, and raises where it is none."""

    def __init__(
        self,
        vocabulary: HfVocabulary,
        template: ChatTemplate | None,
        check: Callable[[str], Any],
        *,
        enable_thinking: bool | None = None,
    ) -> None:
        super().__init__(vocabulary, template, enable_thinking=enable_thinking)
        self._check = check

    def _grammar(self, body: Mapping[str, Any], options: GenerationOptions, plan: ToolPlan) -> str | None:
        """The one keyword argument of the library's filter, as JSON."""
        if body.get("echo") and options.top_logprobs is not None:
            raise UnsupportedParameter("ExLlamaV3 has no log-probabilities of a prompt", param="logprobs")
        own: str | None = body.get("grammar")
        check_one_format(own, options, plan)
        form = options.response_format
        if own is not None:
            return self._checked("grammar", gbnf_grammar=own)
        if plan.mode == "forced":
            call = json.dumps(plan.grammar_schema())
            grammar = f'start: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: %json {call}\n'
            return self._checked("tools", lark_grammar=grammar)
        if form.kind == "json_object":
            return self._checked("response_format", json_schema={"type": "object"})
        if form.kind == "json_schema":
            return self._checked("response_format", json_schema=dict(form.schema or {}))
        return None

    def _checked(self, param: str, **grammar: Any) -> str:
        made = json.dumps(grammar)
        try:
            self._check(made)
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            said = str(error).strip()[:300]
            raise InvalidRequest(f"the schema or grammar cannot be used: {said}", param=param) from error
        return made
