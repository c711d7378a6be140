"""Tools that only a hosted service has, left out of a chat: refused, they would end an agent's work."""

from __future__ import annotations

from typing import Any


def without_hosted_tools(body: Any) -> tuple[Any, list[str]]:
    """The chat body with functions for tools only, and what was left out, as its client knows it.

    A body that its schema will refuse comes back as it is.
    """
    tools = body.get("tools") if isinstance(body, dict) else None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return body, []
    functions = [tool for tool in tools if tool.get("type") == "function"]
    ignored = [f"tools.{tool.get('type')}" for tool in tools if tool.get("type") != "function"]
    if not ignored:
        return body, []
    kept = {**body, "tools": functions}
    choice = body.get("tool_choice")
    if not functions:
        del kept["tools"]
    if not functions or (isinstance(choice, dict) and choice.get("type") != "function"):
        kept.pop("tool_choice", None)
    return kept, list(dict.fromkeys(ignored))
