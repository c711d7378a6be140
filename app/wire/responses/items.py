"""Items of the Responses API: made whole when they come in, and turned into chat messages.

A conversation in items is flatter than one in messages: thoughts, text and each call of the assistant are items of
their own, which belong to one message as long as nobody else has spoken.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import InvalidRequest

PREFIXES = {
    "response": "resp",
    "call": "call",
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}
ROLES = ("user", "assistant", "system", "developer")
#: Parts of a content that are text, by the field in which it stands.
TEXTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}


def new_id(kind: str) -> str:
    """A fresh id for an item of this type."""
    return f"{PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}"


def references(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids of stored items that stand for themselves in an input."""
    return [item["id"] for item in items if is_reference(item)]


def is_reference(item: Mapping[str, Any]) -> bool:
    """Whether an item only names a stored one. The type may be left out."""
    if not isinstance(item.get("id"), str):
        return False
    return item.get("type") == "item_reference" or (item.get("type") is None and "role" not in item)


def whole_items(
    items: Sequence[Mapping[str, Any]], stored: Mapping[str, dict[str, Any]], ignored: list[str]
) -> list[dict[str, Any]]:
    """The items with everything that the official types want: ids, types, lists of parts. References are resolved.

    Items of hosted tools are left out, and named in `ignored`. Raises `InvalidRequest` with the item at fault.
    """
    whole = []
    for index, item in enumerate(items):
        param = f"input.{index}"
        if is_reference(item):
            if item["id"] not in stored:
                raise InvalidRequest(f"the item {item['id']!r} does not exist", param=param, status=404)
            whole.append(stored[item["id"]])
            continue
        kind = item.get("type", "message" if "role" in item else None)
        make = _MAKERS.get(kind) if isinstance(kind, str) else None
        if make is not None:
            whole.append({"id": _id(item, str(kind)), "status": "completed", **make(item, param)})
        elif isinstance(kind, str):
            ignored.append(f"input.{kind}")
        else:
            raise InvalidRequest(f"{param}: must have a type", param=param)
    return whole


def _id(item: Mapping[str, Any], kind: str) -> str:
    given = item.get("id")
    return given if isinstance(given, str) and given else new_id(kind)


def _message(item: Mapping[str, Any], param: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{param}.role: must be one of {', '.join(ROLES)}", param=f"{param}.role")
    content = item.get("content")
    text_type = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        content = [{"type": text_type, "text": content}]
    return {"type": "message", "role": role, "content": _parts(content, f"{param}.content", text_type)}


def _call(item: Mapping[str, Any], param: str) -> dict[str, Any]:
    fields = {name: _text(item, name, param) for name in ("call_id", "name", "arguments")}
    return {"type": "function_call", **fields}


def _call_output(item: Mapping[str, Any], param: str) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(output, f"{param}.output", "input_text")
    return {"type": "function_call_output", "call_id": _text(item, "call_id", param), "output": output}


def _reasoning(item: Mapping[str, Any], param: str) -> dict[str, Any]:
    whole: dict[str, Any] = {"type": "reasoning"}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        whole[name] = _parts(item.get(name) or [], f"{param}.{name}", kind)
    if isinstance(item.get("encrypted_content"), str):
        whole["encrypted_content"] = item["encrypted_content"]
    return whole


_MAKERS = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
    "reasoning": _reasoning,
}


def _text(item: Mapping[str, Any], name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{param}.{name}: must be a string", param=f"{param}.{name}")
    return value


def _parts(content: Any, param: str, text_type: str) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise InvalidRequest(f"{param}: must be a string or a list of parts", param=param)
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        where = f"{param}.{index}"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest(f"{where}: must be an object with a type", param=where)
        if kind == "refusal":
            parts.append({"type": "refusal", "refusal": _text(part, "refusal", where)})
        elif kind in TEXTS:
            said: dict[str, Any] = {"type": text_type, "text": _text(part, "text", where)}
            parts.append({**said, "annotations": []} if text_type == "output_text" else said)
        elif kind in ("input_image", "input_file", "input_audio"):
            parts.append(part)
        else:
            raise InvalidRequest(f"{where}.type: unknown type of content {kind!r}", param=f"{where}.type")
    return parts


# --- as messages


def messages_of(instructions: str | None, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat messages of whole items. System texts at the beginning are one message: few templates know several."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    thoughts = ""
    for item in items:
        kind = item["type"]
        last = messages[-1] if messages else {}
        if kind == "reasoning":
            thoughts += "".join(part["text"] for part in item.get("content") or item["summary"])
            continue
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])})
        elif kind == "function_call":
            if last.get("role") != "assistant" or thoughts:
                last = {"role": "assistant", "content": None}
                messages.append(last)
            function = {"name": item["name"], "arguments": item["arguments"]}
            last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif item["role"] in ("system", "developer"):
            content = _content(item["content"])
            is_leading = len(messages) == 1 and last.get("role") == "system"
            if is_leading and isinstance(content, str) and isinstance(last["content"], str):
                last["content"] = f"{last['content']}\n\n{content}"
            else:
                messages.append({"role": "system", "content": content})
        else:
            messages.append({"role": item["role"], "content": _content(item["content"])})
        if thoughts and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thoughts
        thoughts = ""
    return messages


def _content(content: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """A content as chat has it: one text is a string."""
    if isinstance(content, str):
        return content
    parts = [_chat_part(part) for part in content]
    if all(part["type"] == "text" for part in parts) and len(parts) < 2:
        return "".join(part["text"] for part in parts)
    return parts


def _chat_part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind in TEXTS:
        return {"type": "text", "text": part[TEXTS[kind]]}
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            raise InvalidRequest("an image must have an image_url: there are no stored files", param="input")
        detail = {"detail": part["detail"]} if isinstance(part.get("detail"), str) else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}
    if kind == "input_file":
        return {"type": "file", "file": {name: part[name] for name in ("filename", "file_data") if name in part}}
    return dict(part)
