"""From a request to a prompt: what the model's configuration says where the request says nothing."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InvalidRequest, UnsupportedParameter
from deployments.engines.chat.template import NAMED_FORMATS, ChatTemplate
from deployments.engines.ctranslate2.prepare import Ct2Preparer, Decoding
from deployments.engines.llama_cpp.prepare import LlamaPreparer
from deployments.engines.protocol import Call
from tests.unit.engines.drive import CHAT, COMPLETIONS, ask


class Characters:
    """A vocabulary of single characters."""

    n_ctx, vocab_size, embedding_size = 1000, 0x110000, 0

    def bos_text(self) -> str:
        return ""

    def start_token(self) -> int:
        return 0

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [ord(char) for char in text]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return chr(token).encode()


THINKS = ChatTemplate("{{ messages[0].content }} {{ 'yes' if enable_thinking else 'no' }}{{ tail }}")


def prompt(preparer: LlamaPreparer, body: dict[str, Any], path: str = CHAT) -> str:
    return "".join(map(chr, preparer.prepare(Call(path, body, "r")).prompts[0]))


@pytest.mark.parametrize(
    ("configured", "fields", "expected"),
    [
        (None, {}, "Hi no"),
        (True, {}, "Hi yes"),
        (True, {"enable_thinking": False}, "Hi no"),
        (False, {"enable_thinking": True}, "Hi yes"),
        (True, {"chat_template_kwargs": {"enable_thinking": False, "tail": "!"}}, "Hi no!"),
        (True, {"reasoning_effort": "none"}, "Hi no"),
        (None, {"reasoning": {"effort": "low"}}, "Hi yes"),
    ],
)
def test_a_model_thinks_as_configured_unless_the_request_says_so(
    configured: bool | None, fields: dict[str, Any], expected: str
) -> None:
    assert prompt(LlamaPreparer(Characters(), THINKS, enable_thinking=configured), ask("Hi", **fields)) == expected


def test_control_tokens_are_shown_where_a_call_or_a_thought_may_be_written_with_them() -> None:
    tool = {"type": "function", "function": {"name": "f"}}

    def special(template: ChatTemplate, **fields: Any) -> bool:
        return LlamaPreparer(Characters(), template).prepare(Call(CHAT, ask("Hi", **fields), "r")).special

    assert not special(THINKS)
    assert special(THINKS, tools=[tool])
    assert special(ChatTemplate(NAMED_FORMATS["gemma4_template"]))


def test_what_a_template_has_opened_is_thought() -> None:
    opened = ChatTemplate("{{ messages[0].content }}<think>\n")
    assert LlamaPreparer(Characters(), opened).prepare(Call(CHAT, ask("Hi"), "r")).thinks
    assert not LlamaPreparer(Characters(), THINKS).prepare(Call(CHAT, ask("Hi"), "r")).thinks


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": 1, "temperature": 0.5}, "seed"),
        ({"min_p": 0.1, "temperature": 0.5}, "min_p"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_ctranslate2_cannot_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        Ct2Preparer(Characters(), THINKS).prepare(Call(CHAT, ask("Hi", **fields), "r"))  # type: ignore[arg-type]
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0, "seed": 7, "min_p": 0.5}, Decoding()),
        ({"temperature": 0.5, "top_k": 1}, Decoding()),
        ({"temperature": 0.5, "top_p": 0.9}, Decoding(top_k=0, top_p=0.9, temperature=0.5)),
        ({"top_k": 40, "repetition_penalty": 1.2}, Decoding(top_k=40, repetition_penalty=1.2)),
        ({"temperature": 0, "repetition_penalty": 0, "ignore_eos": True}, Decoding(ignore_eos=True)),
        ({"beam_size": 4, "temperature": 0.7}, Decoding(beam_size=4, limit=9)),
    ],
)
def test_what_ctranslate2_decodes_with(fields: dict[str, Any], expected: Decoding) -> None:
    body = {"prompt": "x", "max_tokens": 9, **fields}
    prepared = Ct2Preparer(Characters(), None).prepare(Call(COMPLETIONS, body, "r"))  # type: ignore[arg-type]
    assert Decoding.of(body, prepared.options, prepared.limits[0]) == expected


@pytest.mark.parametrize("beams", [0, 17, True, "4", 1.5])
def test_beams_have_bounds(beams: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Ct2Preparer(Characters(), None).prepare(  # type: ignore[arg-type]
            Call(COMPLETIONS, {"prompt": "x", "beam_size": beams}, "r")
        )
    assert refused.value.param == "beam_size"
