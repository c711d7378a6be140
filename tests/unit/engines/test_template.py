"""Chat templates: rendering, roles a model does not know, tools, and what is refused."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidRequest, ModelUnavailable, UnsupportedParameter
from deployments.engines.chat.template import NAMED_FORMATS, ChatTemplate, choose_template

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "Hi"}


def test_chatml() -> None:
    prompt = ChatTemplate(NAMED_FORMATS["chatml"]).render([{"role": "system", "content": "Be brief."}, USER])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


#: A translation takes one text, and nothing of a conversation.
@pytest.mark.parametrize("name", sorted(set(NAMED_FORMATS) - {"translategemma_template"}))
def test_every_named_format_renders_every_role(name: str) -> None:
    messages = [{"role": "developer", "content": "S"}, USER, {"role": "assistant", "content": "A"}, USER]
    prompt = ChatTemplate(NAMED_FORMATS[name], bos_token="<bos>").render(messages)
    assert "S" in prompt
    assert "A" in prompt
    assert prompt.count("Hi") == 2


def test_text_parts_are_joined_and_others_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "ab"
    with pytest.raises(UnsupportedParameter) as refused:
        template.render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}])
    assert refused.value.param == "messages"


def test_a_system_text_goes_to_the_user_where_the_model_knows_no_system_role() -> None:
    prompt = ChatTemplate(NAMED_FORMATS["gemma"]).render([{"role": "system", "content": "Be brief."}, USER])
    assert prompt.startswith("<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>")


def test_a_later_system_text_is_the_users_where_the_template_takes_only_the_first() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
        "[{{ m.role }}: {{ m.content }}]{% endfor %}"
    )
    system, late = {"role": "system", "content": "S"}, {"role": "system", "content": "L"}
    answer = {"role": "assistant", "content": "A"}
    assert template.render([system, USER, late, answer]) == "[system: S][user: Hi\n\nL][assistant: A]"
    assert template.render([system, USER, answer, late, USER]) == "[system: S][user: Hi][assistant: A][user: L\n\nHi]"
    assert template.render([system, USER, answer, late]) == "[system: S][user: Hi][assistant: A][user: L]"


def test_an_answer_continues_the_assistants_text_but_not_its_calls() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    text = {"role": "assistant", "content": [{"type": "text", "text": "{"}]}
    assert template.render([USER, text], continues=True) == "[Hi]>{"
    assert template.render([USER, text]) == "[Hi][{]>"
    assert template.render([USER], continues=True) == "[Hi]>"


def test_raise_exception_is_a_refusal_with_the_templates_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([USER])


def test_tools_are_described_when_the_template_knows_none() -> None:
    prompt = ChatTemplate(NAMED_FORMATS["chatml"]).render([USER], TOOLS)
    assert '"name": "add"' in prompt
    assert "<tool_call>" in prompt
    assert prompt.startswith("<|im_start|>system")


def test_a_template_with_tools_gets_them_and_earlier_calls_as_objects() -> None:
    template = ChatTemplate(
        "{{ tools | tojson }}{% for m in messages %}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.arguments.x }}{% endif %}{{ m.role }};{% endfor %}"
    )
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x": 7}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "8"}]
    prompt = template.render(messages, TOOLS)
    assert prompt.startswith('[{"type": "function"')
    assert prompt.endswith("user;7assistant;tool;")


def test_earlier_calls_become_text_where_the_template_knows_no_tools() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x": 7}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "8"}]
    prompt = ChatTemplate(NAMED_FORMATS["chatml"]).render(messages)
    assert '<tool_call>\n{"name": "add", "arguments": {"x": 7}}\n</tool_call>' in prompt
    assert "<tool_response>\n8\n</tool_response>" in prompt


def test_the_environment_is_the_one_templates_are_written_for() -> None:
    source = "{% for m in messages %}\n{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}\n{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "<é>"}]) == '{"role": "user", "content": "<é>"}'
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([USER]).isdigit()


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}").render([USER])


def test_choosing_the_template() -> None:
    assert choose_template(None, "own") == "own"
    assert choose_template("chatml", "own") == NAMED_FORMATS["chatml"]
    assert choose_template("{{ 1 }}", None) == "{{ 1 }}"
    with pytest.raises(ModelUnavailable, match="chatml"):
        choose_template("nonsense", None)
    with pytest.raises(ModelUnavailable):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize("messages", [["text"], [{"content": "x"}], [{"role": "x", "content": "y"}]])
def test_malformed_messages_are_refused(messages: list[object]) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ 1 }}").render(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("thinks", "system", "prompt"),
    [
        (None, None, "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"),
        (True, None, "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"),
        (
            True,
            "Be brief.",
            "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
        ),
        (
            False,
            "Be brief.",
            "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        ),
    ],
)
def test_gemma_4_thinks_if_it_is_told_to(thinks: bool | None, system: str | None, prompt: str) -> None:
    template = ChatTemplate(NAMED_FORMATS["gemma4_template"], bos_token="<bos>")
    messages = [*([{"role": "system", "content": system}] if system else []), USER]
    variables = {} if thinks is None else {"enable_thinking": thinks}
    assert template.render(messages, variables=variables) == prompt
    assert template.shows_control_tokens
    assert not ChatTemplate(NAMED_FORMATS["chatml"]).shows_control_tokens


def test_gemma_4_knows_earlier_turns_and_described_tools() -> None:
    template = ChatTemplate(NAMED_FORMATS["gemma4_template"])
    answer = {"role": "assistant", "content": "Hello."}
    assert template.render([USER, answer, USER]).count("<|turn>model\nHello.<turn|>\n<|turn>user\nHi<turn|>") == 1
    assert template.render([USER], TOOLS).startswith("<|turn>system\nYou can call these functions")


def test_a_translation_names_its_languages_and_needs_both():
    template = ChatTemplate(NAMED_FORMATS["translategemma_template"], bos_token="<bos>")
    messages = [{"role": "user", "content": " Guten Tag\n"}]
    prompt = template.render(messages, variables={"source_lang_code": "de_AT", "target_lang_code": "tlh"})
    assert prompt.startswith(
        "<bos><start_of_turn>user\nYou are a professional German (de-AT) to tlh (tlh) translator. Your goal"
    )
    assert prompt.endswith("text into tlh:\n\n\nGuten Tag<end_of_turn>\n<start_of_turn>model\n")
    with pytest.raises(InvalidRequest, match="target_lang_code"):
        template.render(messages, variables={"source_lang_code": "de"})
