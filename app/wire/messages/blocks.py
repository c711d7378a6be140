"""Content blocks of Messages as messages of a chat: text, images, tools' calls and results, thinking.

A block that the chat has no place for, and that the answer would depend on, is refused with its path. What only
Anthropic's own servers do (their search, their code execution) is left out and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cluster.errors import InvalidRequest, UnsupportedParameter

Message = dict[str, Any]
Block = dict[str, Any]

#: Claude Code's first system block begins so. It holds a hash that differs in every conversation: with it no two of
#: them would share the beginning of their prompts, which are tens of thousands of tokens.
BILLING_HEADER = "x-anthropic-billing-header:"

#: Blocks of a conversation that Anthropic's own tools have left in it.
_HOSTED = ("server_tool_use", "mcp_tool_use", "redacted_thinking", "container_upload", "compaction", "fallback")


def system_text(system: str | list[Block] | None, ignored: list[str]) -> str:
    """The system prompt in one piece, without the billing header."""
    if system is None or isinstance(system, str):
        return system or ""
    texts = [_text_of(block, f"system.{index}") for index, block in enumerate(system)]
    kept = [text for text in texts if not text.startswith(BILLING_HEADER)]
    if len(kept) < len(texts):
        ignored.append("system.x-anthropic-billing-header")
    return "\n\n".join(filter(None, kept))


def chat_messages(role: str, content: str | list[Block], path: str, ignored: list[str]) -> list[Message]:
    """What one message is in a chat: one message, or several where it brings results of tools."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if role == "assistant":
        return [_assistant(content, path, ignored)]
    if role == "system":
        return [{"role": role, "content": system_text(content, ignored)}]
    return list(_user(content, path, ignored))


def _assistant(content: list[Block], path: str, ignored: list[str]) -> Message:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(content):
        at = f"{path}.content.{index}"
        kind = _kind(block, at)
        if kind == "text":
            texts.append(_text_of(block, at))
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking", at))
        elif kind == "tool_use":
            arguments = json.dumps(_member(block, "input", dict, at), ensure_ascii=False)
            function = {"name": _string(block, "name", at), "arguments": arguments}
            calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
        elif _is_hosted(kind):
            ignored.append(f"messages.{kind}")
        else:
            raise _refused(kind, at)
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(content: list[Block], path: str, ignored: list[str]) -> Iterator[Message]:
    """Results of tools first in their own messages, as the chat wants them right behind the calls."""
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        at = f"{path}.content.{index}"
        if _kind(block, at) != "tool_result":
            parts += _parts(block, at, ignored)
            continue
        text, images = _result(block, at, ignored)
        yield {"role": "tool", "tool_call_id": _string(block, "tool_use_id", at), "content": text}
        # A chat's tool message holds text only; what a tool shows follows it as the user's.
        parts += images
    if parts:
        yield {"role": "user", "content": _joined(parts)}


def _result(block: Block, at: str, ignored: list[str]) -> tuple[str, list[dict[str, Any]]]:
    content = block.get("content") or ""
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = [part for index, each in enumerate(content) for part in _parts(each, f"{at}.content.{index}", ignored)]
    else:
        raise InvalidRequest(f"{at}.content: must be a string or a list of blocks", param=f"{at}.content")
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    # A model has no other way to see that its call has failed.
    text = f"Error: {text}" if block.get("is_error") is True else text
    return text, [part for part in parts if part["type"] != "text"]


def _parts(block: Any, at: str, ignored: list[str]) -> list[dict[str, Any]]:
    """One block of a user, or of a tool's result, as parts of a chat message."""
    kind = _kind(block, at)
    if kind == "text":
        return [{"type": "text", "text": _text_of(block, at)}]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _image_url(block, at)}}]
    if kind == "tool_reference":
        return [{"type": "text", "text": _string(block, "tool_name", at)}]
    if kind == "search_result":
        found = [_text_of(each, f"{at}.content") for each in _member(block, "content", list, at)]
        head = f"{_string(block, 'title', at)}\n{_string(block, 'source', at)}"
        return [{"type": "text", "text": "\n".join([head, *found])}]
    if kind == "document":
        return _document(block, at, ignored)
    if _is_hosted(kind):
        ignored.append(f"messages.{kind}")
        return []
    raise _refused(kind, at)


def _document(block: Block, at: str, ignored: list[str]) -> list[dict[str, Any]]:
    source = _member(block, "source", dict, at)
    title = block.get("title")
    head = [{"type": "text", "text": title}] if isinstance(title, str) and title else []
    if source.get("type") == "text":
        return [*head, {"type": "text", "text": _string(source, "data", f"{at}.source")}]
    if source.get("type") == "content":
        content = source.get("content")
        if isinstance(content, str):
            return [*head, {"type": "text", "text": content}]
        blocks = _member(source, "content", list, f"{at}.source")
        return head + [part for each in blocks for part in _parts(each, f"{at}.source.content", ignored)]
    raise UnsupportedParameter(f"{at}: a document must be text here, not {source.get('type')!r}", param=at)


def _image_url(block: Block, at: str) -> str:
    source = _member(block, "source", dict, at)
    if source.get("type") == "url":
        return _string(source, "url", f"{at}.source")
    if source.get("type") == "base64":
        media_type = _string(source, "media_type", f"{at}.source")
        return f"data:{media_type};base64,{_string(source, 'data', f'{at}.source')}"
    raise UnsupportedParameter(f"{at}: an image must come as base64 or url, not {source.get('type')!r}", param=at)


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Text alone as one string, which every template and every server takes."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _is_hosted(kind: str) -> bool:
    return kind in _HOSTED or kind.endswith("_tool_result")


def _refused(kind: str, at: str) -> InvalidRequest:
    return UnsupportedParameter(f"{at}: blocks of type {kind!r} are not supported here", param=at)


def _kind(block: Any, at: str) -> str:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise InvalidRequest(f"{at}: a content block must be an object with a type", param=at)
    kind: str = block["type"]
    return kind


def _text_of(block: Any, at: str) -> str:
    if _kind(block, at) != "text":
        raise _refused(block["type"], at)
    return _string(block, "text", at)


def _string(block: Block, name: str, at: str) -> str:
    value: str = _member(block, name, str, at)
    return value


def _member(block: Block, name: str, kind: type, at: str) -> Any:
    value = block.get(name)
    if not isinstance(value, kind):
        wanted = "a string" if kind is str else "a list" if kind is list else "an object"
        raise InvalidRequest(f"{at}.{name}: must be {wanted}", param=f"{at}.{name}")
    return value
