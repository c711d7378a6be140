"""Models whose engine is another server: one that the pool starts by a command, or a remote API that it only calls.

    sglang, server        a command, started and ended with the model, on a port of this machine that is free
    openai_compatible     a remote API with a key, called only for requests that allow it

What is decided from these keys stands elsewhere: the launch line in `deployments/engines/launch.py`.
"""

from __future__ import annotations

import difflib
import shlex
from string import Template
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.config.models import ModelConfig

#: What `${…}` may stand for in a command, an argument, or a variable of the environment.
MACROS = ("PORT", "MODEL_PATH", "MODEL_ID", "SLOTS", "PYTHON")
#: Flags of SGLang's that the pool sets itself, so that its bounds hold.
SGLANG_OWN = ("--max-running-requests", "--max-total-tokens", "--host", "--port", "--model-path", "--model")

Path = Annotated[str, Field(pattern=r"^/[^\s?#]*$")]


class _LaunchKwargs(BaseModel):
    """What commands have in common.

    `command`, `args` and `env` may hold `${PORT}`, `${MODEL_PATH}`, `${MODEL_ID}`, `${SLOTS}` and `${PYTHON}`; `$$` is
    a dollar sign. No shell is involved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Stand behind the command that the pool makes.
    args: tuple[str, ...] = ()
    #: Laid over the environment of the pool's processes.
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    #: Answers 200 once the server serves. Unset: `/health`.
    ready_path: Path | None = None

    @field_validator("args", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _words(value)

    @field_validator("args")
    @classmethod
    def _known_macros(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_checked, value))

    @field_validator("env")
    @classmethod
    def _known_macros_of_values(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: _checked(each) for name, each in value.items()}


class ServerKwargs(_LaunchKwargs):
    """`engine_kwargs` of `backend: server`: a `command`, or a `preset` that is one."""

    #: The command line, as a text or a list of words.
    command: tuple[str, ...] = ()
    #: A command line that the pool knows.
    preset: Literal["vllm", "llama_server"] | None = None
    #: What the server calls the model, where that is not its id.
    served_model: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("command", mode="before")
    @classmethod
    def _split_command(cls, value: Any) -> Any:
        return _words(value)

    @field_validator("command")
    @classmethod
    def _known_macros_of_command(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_checked, value))

    @field_validator("preset", mode="before")
    @classmethod
    def _other_spelling(cls, value: Any) -> Any:
        return value.replace("-", "_") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_command(self) -> Self:
        if bool(self.command) == (self.preset is not None):
            raise ValueError("exactly one of command and preset is needed")
        if self.command and "${PORT}" not in " ".join((*self.command, *self.args, *self.env.values())):
            raise ValueError("command: without ${PORT} nobody would find the server")
        return self


class SglangKwargs(_LaunchKwargs):
    """`engine_kwargs` of `backend: sglang`: more of `python -m sglang.launch_server`'s arguments."""

    @field_validator("args")
    @classmethod
    def _not_our_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each.partition("=")[0].replace("_", "-") in SGLANG_OWN:
                raise ValueError(f"{each}: the pool sets this itself")
        return value


class LaunchedModel(ModelConfig):
    """A model whose server is a command. `python` is only what `${PYTHON}` stands for."""

    starts_command = True
    in_folder: ClassVar[bool | None] = None


class ServerModel(LaunchedModel):
    """A model in a server that a command starts, or one of the presets `vllm` and `llama_server`."""

    backend: Literal["server"] = "server"
    #: The command, and what belongs to it.
    engine_kwargs: ServerKwargs

    @property
    def formats(self) -> tuple[str, ...]:
        return {"vllm": ("hf", "awq", "gguf"), "llama_server": ("gguf",)}.get(self.engine_kwargs.preset or "", ())

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if self.engine_kwargs.preset and not self.model_path:
            raise ValueError(f"model_path is required for the preset {self.engine_kwargs.preset}")
        return self


class SglangModel(LaunchedModel):
    """A model in SGLang's server, in whatever environment has it (`python`)."""

    sleeps = True
    in_folder = True

    backend: Literal["sglang"] = "sglang"
    #: The most requests at a time; the pool's key of this name is a bound on it.
    sglang_max_running_requests: Annotated[int, Field(ge=1)] | None = None
    #: The most tokens that it holds, 0 = what fits; the pool's key of this name is a bound on it.
    sglang_max_total_tokens: Annotated[int, Field(ge=0)] | None = None
    #: The command, and what belongs to it.
    engine_kwargs: SglangKwargs = SglangKwargs()

    @field_validator("engine_kwargs", mode="before")
    @classmethod
    def _none_given(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if not self.model_path:
            raise ValueError("model_path is required for backend sglang")
        return self

    @property
    def formats(self) -> tuple[str, ...]:
        return ("hf", "awq")

    @property
    def slots(self) -> int:
        return min(self.target_inflight, self.sglang_max_running_requests or self.target_inflight)

    def bounded(self, running_requests: int, total_tokens: int) -> Self:
        """The model within the pool's bounds; tokens 0 = none."""
        running = min(running_requests, self.sglang_max_running_requests or running_requests)
        tokens = min(filter(None, (total_tokens, self.sglang_max_total_tokens)), default=0)
        return self.model_copy(update={"sglang_max_running_requests": running, "sglang_max_total_tokens": tokens})


class RemoteBudget(BaseModel):
    """What may be used on one day (UTC): requests, and what they cost by the model's `price`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Requests.
    requests: Annotated[int, Field(ge=0)] | None = None
    #: What they cost.
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class RemoteModel(ModelConfig):
    """A model behind a remote API that has its price. Only requests with `allow_remote: true` reach it."""

    is_remote = True

    backend: Literal["openai_compatible"] = "openai_compatible"
    #: What the API speaks.
    remote_api_kind: Literal["chat_completions"] = "chat_completions"
    #: What stands before `/chat/completions`; without a path, `/v1` is meant.
    remote_base_url: Annotated[str, Field(pattern=r"^https?://[^/\s@?#]+(/[^\s?#]*)?$")]
    #: The environment variable that holds the key.
    remote_api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    #: What the API calls the model. Unset: as the pool does.
    remote_model: Annotated[str, Field(min_length=1)] | None = None
    #: How long it may be silent, in seconds.
    remote_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    #: `config_only`: nothing is asked of the API to see whether it is there.
    remote_health_check: Literal["config_only"] = "config_only"
    #: A request is sent so many times more where nothing of an answer came.
    remote_max_retries: Annotated[int, Field(ge=0, le=10)] = 0
    #: Sent as `thinking: {type: …}`.
    remote_thinking: Literal["enabled", "disabled"] | None = None
    #: What may be used of the model on one day; beyond it a request is refused with 402.
    remote_budget: RemoteBudget | None = None
    #: The same for each key's use of it (of who asks without one: together).
    remote_budget_per_key: RemoteBudget | None = None

    @property
    def format(self) -> None:
        return None

    @model_validator(mode="after")
    def _runs_nowhere(self) -> Self:
        if self.num_gpus or self.model_path or self.python:
            raise ValueError("a remote model has no num_gpus, model_path or python here")
        return self


def _words(value: Any) -> Any:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


def _checked(text: str) -> str:
    """A text whose macros are all known. Raises `ValueError`."""
    template = Template(text)
    if not template.is_valid():
        raise ValueError(f"{text!r}: a dollar sign begins a macro, ${{PORT}} say; $$ is one that does not")
    for name in template.get_identifiers():
        if name not in MACROS:
            near = difflib.get_close_matches(name, MACROS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MACROS)}"
            raise ValueError(f"{text!r}: no such macro, {hint}")
    return text
