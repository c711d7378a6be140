"""vLLM's own `LLM`, asked over standard input: one JSON list per line, answered by one line of JSON.

    python tests/contract/vllm_library.py FOLDER ARGUMENTS

is run by the interpreter of vLLM's environment.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class Library:
    """The model is loaded when it is first asked to write; the tokenizer needs none."""

    def __init__(self, folder: str, arguments: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        self._folder, self._arguments = folder, arguments
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._llm: Any = None

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def count_chat(self, messages: list[dict[str, Any]]) -> int:
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.count(text)

    def greedy(self, prompt: str, tokens: int) -> str:
        from vllm import LLM, SamplingParams

        self._llm = self._llm or LLM(self._folder, **self._arguments)
        greedy = SamplingParams(temperature=0, max_tokens=tokens)
        (answer,) = self._llm.chat([{"role": "user", "content": prompt}], greedy, use_tqdm=False)
        text: str = answer.outputs[0].text
        return text


def main() -> None:
    # vLLM writes to standard output, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library = Library(sys.argv[1], json.loads(sys.argv[2]))
    for line in sys.stdin:
        name, *given = json.loads(line)
        print(json.dumps(getattr(library, name)(*given)), file=answers, flush=True)


if __name__ == "__main__":
    main()
