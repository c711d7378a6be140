"""Gemma 4's chat format (https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4), for weights that bring none.

Turns stand between marks of their own. With `enable_thinking` the system's turn begins with the mark for it, and the
model writes what it thinks into a channel; with `enable_thinking` false an empty channel stands in front of the answer,
since the larger models would open one all the same. Tools are described in words, as for every template without them.
"""

from __future__ import annotations

#: Jinja, like every other template.
GEMMA4 = (
    "{{ bos_token }}{% set thinks = enable_thinking is defined and enable_thinking %}"
    "{% set first = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{% if thinks or first %}"
    "{{ '<|turn>system\\n' + ('<|think|>\\n' if thinks else '') + first + '<turn|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if not (loop.first and m.role == 'system') %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<turn|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}"
    "{% endif %}"
)
