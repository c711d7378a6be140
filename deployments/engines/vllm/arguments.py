"""From a model's configuration to the arguments of `vllm serve`, checked by vLLM's own parser.

What the pool decides itself (slots, devices, names, priorities) is set here; everything else is the configuration's
`engine_kwargs`. Blocks, and imports vLLM.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from cluster.config import VllmModel
from cluster.errors import ModelUnavailable
from deployments.engines.chat.template import choose_template

#: What vLLM is to leave alone, unless the operator has set it: the network, and its user's statistics.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
#: Of a device that several models share, as much of each model's part is used: there is always more than one has asked.
SHARED_PART = 0.9
#: Tool calls are read as most models write them, `<tool_call>{…}</tool_call>`; `tool_call_parser` names another way.
TOOL_CALL_PARSER = "hermes"


def set_environment() -> None:
    """What vLLM reads while it is imported. It must be set before that."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def arguments_of(model_id: str, model: VllmModel, path: str) -> argparse.Namespace:
    """What `vllm serve` would make of its command line. Raises `ModelUnavailable` for what vLLM does not take."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.error = _refuse
    check_names(model.engine_kwargs, vars(parser.parse_args([])))
    arguments: argparse.Namespace = parser.parse_args(command_line(given_to(model_id, model, path)))
    if model.sleep_level != 1:
        # Who asks for nothing better is content with an engine that ends.
        arguments.enable_sleep_mode &= current_platform.is_sleep_mode_available()
    try:
        validate_parsed_serve_args(arguments)
        validate_api_server_args(arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelUnavailable(f"engine_kwargs: {reason_of(error, path)}") from None
    return arguments


def _refuse(message: str) -> NoReturn:
    """What a parser does with a command line that it does not take, instead of ending the process."""
    raise ModelUnavailable(f"engine_kwargs: {message}")


def given_to(model_id: str, model: VllmModel, path: str) -> dict[str, Any]:
    """vLLM's arguments, by their names. None is vLLM's own default."""
    return {**_defaults(model), **model.engine_kwargs, **_own(model_id, model, path)}


def _defaults(model: VllmModel) -> dict[str, Any]:
    """What the configuration may say otherwise."""
    defaults: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": TOOL_CALL_PARSER}
    if model.type != "llm":
        defaults = {}
    if 0 < model.num_gpus < 1:
        defaults["gpu_memory_utilization"] = round(SHARED_PART * model.num_gpus, 3)
    if model.enable_thinking is not None:
        defaults["default_chat_template_kwargs"] = {"enable_thinking": model.enable_thinking}
    return defaults


def _own(model_id: str, model: VllmModel, path: str) -> dict[str, Any]:
    """What is the pool's to say. Statistics per request are what its metrics are made of."""
    return {
        "model": path,
        "served_model_name": [model_id],
        "max_num_seqs": model.target_inflight,
        "tensor_parallel_size": max(1, int(model.num_gpus)),
        "scheduling_policy": "priority",
        "enable_sleep_mode": bool(model.num_gpus) and model.sleep_level != 2,
        "runner": None if model.type == "llm" else "pooling",
        "chat_template": choose_template(model.prompt_format, None),
        "enable_prompt_tokens_details": True,
        "enable_per_request_metrics": True,
        "disable_uvicorn_access_log": True,
        "disable_fastapi_docs": True,
    }


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Whether vLLM has all these arguments. Raises `ModelUnavailable` with the nearest that it has."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ModelUnavailable(f"engine_kwargs: vLLM has no argument {name!r}{hint}")


def command_line(arguments: dict[str, Any]) -> list[str]:
    """These arguments as they would be typed. What is None is left out, which is its default."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(_word, value)]
        else:
            words.append(f"--{flag}={_word(value)}")
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def reason_of(error: BaseException, path: str) -> str:
    """What an error of vLLM says, for people who must not read paths of this machine."""
    text = str(error).strip() or type(error).__name__
    text = text.replace(path, "the model")
    # Pydantic's errors begin with a line that only counts them, and end with a link.
    lines = [line.strip() for line in text.splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    if len(lines) > 1 and re.match(r"\d+ validation errors? for", lines[0]):
        lines = lines[1:]
    told = re.sub(r" \[type=\w+, .*", "", " ".join(lines))[:400]
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*", "a path", told)
