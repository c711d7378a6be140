"""From a call to the generations it needs: translates the body, renders the prompt, tokenizes it, checks what fits.

Everything here happens before whatever decodes hears of the request, so that a refusal costs the running streams
nothing. It may block for as long as a large text takes to tokenize: an engine runs it in a thread then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from deployments.engines.chat.request import GenerationOptions, chat_options, completion_options
from deployments.engines.chat.template import ChatTemplate
from deployments.engines.chat.thinking import is_opened
from deployments.engines.chat.tools import ToolPlan, tool_plan
from deployments.engines.chat.vocabulary import Vocabulary
from deployments.engines.protocol import Call
from deployments.schemas import CHAT, COMPLETIONS, EMBEDDINGS, prompts_of


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request: `prompts` as tokens (with `options.n` choices for each) and what to make of them."""

    chat: bool
    options: GenerationOptions
    prompts: list[list[int]]
    limits: list[int]
    #: What to repeat in front of each prompt's answer (`echo`).
    echoes: list[str]
    plan: ToolPlan = field(default_factory=ToolPlan)
    grammar: str | None = None
    echo: bool = False
    #: Only the prompts' embeddings are wanted.
    embeds: bool = False
    #: The template has opened the model's thoughts.
    thinks: bool = False
    #: Control tokens are text: a call, or the marks of a thought, may be written with them.
    special: bool = False

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class Preparer:
    """Prepares calls for one loaded model; each engine says what its library can. Thread-safe: it only reads the
    vocabulary."""

    def __init__(
        self, runtime: Vocabulary, template: ChatTemplate | None, *, enable_thinking: bool | None = None
    ) -> None:
        """`enable_thinking` holds where a request says nothing of it."""
        self._runtime = runtime
        self._template = template
        self._enable_thinking = enable_thinking

    @property
    def context_length(self) -> int:
        """Tokens of one sequence, prompt and answer together."""
        return self._runtime.n_ctx

    def prepare(self, call: Call) -> Prepared:
        """Raises `InvalidRequest` and its subclasses; touches no engine state. The body has passed its schema."""
        if call.path == CHAT:
            return self._chat(call.json)
        if call.path == COMPLETIONS:
            return self._completion(call.json)
        if call.path == EMBEDDINGS:
            return self._embeddings(call.json)
        raise InvalidRequest(f"this model does not serve {call.path}")

    def tokens(self, body: Mapping[str, Any]) -> list[int]:
        """The tokens of a text, or of a chat as the model would see it. Raises `InvalidRequest`."""
        if body.get("messages") is not None:
            return self._chat_tokens(self._chat_text(body, tool_plan(body)))
        text = body["prompt"] if body.get("content") is None else body["content"]
        special = body.get("add_special")
        # llama-server adds none by default, vLLM does; so the name of the text decides.
        add_special = body.get("content") is None if special is None else special
        return self._runtime.tokenize(text, add_special=add_special, parse_special=True)

    def text(self, tokens: list[int]) -> str:
        """The text of some tokens. Raises `InvalidRequest`."""
        self._check_tokens(tokens, "tokens")
        return self._text(tokens)

    def piece(self, token: int) -> str:
        """The text of one token."""
        return self._text([token])

    def _embeddings(self, body: Mapping[str, Any]) -> Prepared:
        given = prompts_of(body["input"])
        if body.get("dimensions") not in (None, self._runtime.embedding_size):
            raise UnsupportedParameter("this model's embeddings have one size", param="dimensions")
        prompts = [self._tokens(one, "input") for one in given]
        for prompt in prompts:
            if len(prompt) > self._runtime.n_ctx:
                raise ContextLengthExceeded(
                    f"this model's context is {self._runtime.n_ctx} tokens; the input has {len(prompt)}", param="input"
                )
        nothing = [0] * len(prompts)
        return Prepared(False, completion_options({}), prompts, nothing, [""] * len(prompts), embeds=True)

    def _chat_text(self, body: Mapping[str, Any], plan: ToolPlan) -> str:
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or configure prompt_format", param="messages"
            )
        shown = plan.tools if plan.mode != "none" else ()
        continues = bool(body.get("continue_final_message"))
        return self._template.render(body["messages"], shown, self._template_variables(body), continues=continues)

    def _chat_tokens(self, text: str) -> list[int]:
        # A template that writes the BOS token itself must not get a second one.
        bos = self._runtime.bos_text()
        starts = bool(bos) and text.startswith(bos)
        return self._runtime.tokenize(text, add_special=not starts, parse_special=True)

    def _chat(self, body: Mapping[str, Any]) -> Prepared:
        options = chat_options(body)
        plan = tool_plan(body)
        text = self._chat_text(body, plan)
        prompt = self._chat_tokens(text)
        return Prepared(
            chat=True,
            options=options,
            prompts=[prompt],
            limits=[self._limit(prompt, options, explicit=_is_explicit(body))],
            echoes=[""],
            plan=plan,
            grammar=self._grammar(body, options, plan),
            thinks=is_opened(text),
            special=bool(plan.tools) or self._shows_control_tokens(),
        )

    def _shows_control_tokens(self) -> bool:
        return self._template is not None and self._template.shows_control_tokens

    def _completion(self, body: Mapping[str, Any]) -> Prepared:
        options = completion_options(body)
        given = prompts_of(body["prompt"])
        prompts = [self._tokens(one) for one in given]
        explicit = _is_explicit(body)
        echo = bool(body.get("echo"))
        return Prepared(
            chat=False,
            options=options,
            prompts=prompts,
            limits=[self._limit(prompt, options, explicit=explicit) for prompt in prompts],
            echoes=self._echoes(given, prompts) if echo else [""] * len(prompts),
            grammar=self._grammar(body, options, ToolPlan()),
            echo=echo,
        )

    def _template_variables(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Values for the template; one that the template does not read, but should, is refused."""
        assert self._template is not None
        variables = {} if self._enable_thinking is None else {"enable_thinking": self._enable_thinking}
        variables |= body.get("chat_template_kwargs") or {}
        if body.get("enable_thinking") is not None:
            variables["enable_thinking"] = body["enable_thinking"]
        effort = body.get("reasoning_effort") or (body.get("reasoning") or {}).get("effort")
        if effort is None:
            return variables
        if self._template.knows("reasoning_effort"):
            variables["reasoning_effort"] = effort
        elif self._template.knows("enable_thinking"):
            variables["enable_thinking"] = effort != "none"
        elif effort != "none":
            raise UnsupportedParameter("this model does not reason", param="reasoning_effort")
        return variables

    def _tokens(self, prompt: str | list[int], param: str = "prompt") -> list[int]:
        if isinstance(prompt, str):
            tokens = self._runtime.tokenize(prompt, add_special=True, parse_special=True)
            return tokens or [self._runtime.start_token()]
        self._check_tokens(prompt, param)
        return list(prompt)

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        if max(tokens, default=0) >= self._runtime.vocab_size:
            raise InvalidRequest(f"token ids must be below {self._runtime.vocab_size}", param=param)

    def _echoes(self, given: list[str | list[int]], prompts: list[list[int]]) -> list[str]:
        return [one if isinstance(one, str) else self._text(tokens) for one, tokens in zip(given, prompts, strict=True)]

    def _text(self, tokens: list[int]) -> str:
        return b"".join(self._runtime.piece(token, special=True) for token in tokens).decode("utf-8", "replace")

    def _limit(self, prompt: list[int], options: GenerationOptions, *, explicit: bool) -> int:
        """How many tokens the answer may have. An explicit `max_tokens` that does not fit is refused, as by OpenAI."""
        room = self._runtime.n_ctx - len(prompt)
        wanted = options.max_tokens
        if room < 1 or (explicit and wanted is not None and wanted > room):
            asked = f" and {wanted} new ones" if explicit and wanted is not None else ""
            raise ContextLengthExceeded(
                f"this model's context is {self._runtime.n_ctx} tokens; the prompt has {len(prompt)}{asked}",
                param="max_tokens" if room >= 1 else "messages",
            )
        return room if wanted is None else min(wanted, room)

    def _grammar(self, body: Mapping[str, Any], options: GenerationOptions, plan: ToolPlan) -> str | None:
        """What holds the answer to a format, in the words of the engine's library; None where nothing is to.

        Raises `InvalidRequest`, for whatever else the library cannot do as well.
        """
        raise NotImplementedError


def _is_explicit(body: Mapping[str, Any]) -> bool:
    """Whether the client counts on all the tokens that it asks for; else they are a bound, and what fits will do."""
    asked = body.get("max_completion_tokens") is not None or body.get("max_tokens") is not None
    return asked and not body.get("clamp_max_tokens")


def check_one_format(grammar: str | None, options: GenerationOptions, plan: ToolPlan) -> None:
    """Raise `InvalidRequest` where a request holds its answer to more than one format."""
    if sum((options.response_format.kind != "text", plan.mode == "forced", grammar is not None)) > 1:
        raise InvalidRequest(
            "response_format, a forced tool_choice and grammar exclude each other", param="response_format"
        )
