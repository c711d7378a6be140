"""A model's folder as Hugging Face lays it out: tokenizer, chat template and the marks that lie beside the weights.

What is raised here reaches clients, so it names a file at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from cluster.errors import ModelUnavailable

#: Context of a model whose tokenizer says nothing of it, in tokens; some say "none" with a number beyond `MAX_CONTEXT`.
DEFAULT_CONTEXT, MAX_CONTEXT = 4096, 10**7


class HfFolder:
    """What a folder says of its model. Raises `ModelUnavailable` where something that is needed is not there."""

    #: Files that must be there, and what a folder without them is not.
    needed: ClassVar[tuple[str, ...]] = ("config.json", "tokenizer.json")
    what: ClassVar[str] = "a model in a Hugging Face folder"

    def __init__(self, path: Path) -> None:
        for name in self.needed:
            if not (path / name).is_file():
                raise ModelUnavailable(f"{path.name} has no {name}, and so is not {self.what}")
        self._path = path
        self._tokens = read_json(path / "tokenizer_config.json")
        self._model = read_json(path / "config.json")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as the `tokenizers` library has it; loading it takes about half a second."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._path / "tokenizer.json"))

    @property
    def context_length(self) -> int:
        """Tokens of one sequence, as far as the tokenizer knows."""
        length = self._tokens.get("model_max_length")
        return int(length) if isinstance(length, int | float) and 0 < length <= MAX_CONTEXT else DEFAULT_CONTEXT

    @property
    def bos(self) -> str:
        """The text of the token that begins a prompt; empty where there is none."""
        return _text(self._tokens.get("bos_token")) or _text(self._model.get("bos_token"))

    @property
    def ends(self) -> list[str]:
        """The texts of the tokens that may end an answer."""
        marks = [_text(self._tokens.get("eos_token")), _text(self._model.get("eos_token"))]
        return list(dict.fromkeys(filter(None, marks)))

    @property
    def end_ids(self) -> list[int]:
        """The tokens of `generation_config.json` that end an answer: chat models often have several."""
        given = read_json(self._path / "generation_config.json").get("eos_token_id")
        return [each for each in (given if isinstance(given, list) else [given]) if isinstance(each, int)]

    @property
    def chat_template(self) -> str | None:
        """The model's own template, in a file of its own or in the tokenizer's; of several, the default one."""
        file = self._path / "chat_template.jinja"
        if file.is_file():
            return file.read_text()
        given = self._tokens.get("chat_template")
        if isinstance(given, list):
            given = {each.get("name"): each.get("template") for each in given}.get("default")
        return given if isinstance(given, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises `ModelUnavailable` for one that is broken."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise ModelUnavailable(f"{path.name} of the model cannot be read") from None
    return found if isinstance(found, dict) else {}


def _text(token: Any) -> str:
    """A token's text, which stands there plainly or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
