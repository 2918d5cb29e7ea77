"""The messages of a conversation, in the form that chat templates are written for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

_OPTIONAL = {
    "system": (),
    "developer": (),
    "user": (),
    "assistant": ("tool_calls", "reasoning_content"),
    "tool": ("tool_call_id",),
}
"""Keys beside role, content and name, by role."""


def plain_messages(messages: Sequence[Mapping[str, Any]], *, parse_arguments: bool = False) -> list[dict[str, Any]]:
    """Reduces messages to plain data with the keys that templates read, `content` as one string.

    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    [{'role': 'user', 'content': 'ab'}]

    Args:
      messages: as for `ChatTemplate.render`.
      parse_arguments: arguments of tool calls become objects; otherwise they stay the model's text.

    Raises:
      ValueError: there are none, or one does not have the form that `ChatTemplate.render` takes.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError("messages: expected a list of one or more messages.")
    return [_plain_message(message, f"messages[{i}]", parse_arguments) for i, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], where: str, parse_arguments: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object with role and content, got {type(message).__name__}.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r}.")
    allowed = ("role", "content", "name", *_OPTIONAL[role])
    if extra := sorted(map(str, message.keys() - set(allowed))):
        raise ValueError(f"{where}.{extra[0]}: not supported; a message with role {role} has {', '.join(allowed)}.")
    if isinstance(content, list | tuple):
        content = "".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    calls = message.get("tool_calls") or ()
    # Templates tell a call without text by `content` that is none; an answer with neither is an empty one.
    if content is None and role == "assistant":
        content = None if calls else ""
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a string or a list of text parts, got {type(content).__name__}.")
    plain = {"role": role, "content": content}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise ValueError(f"{where}.{key}: expected a string, got {type(message[key]).__name__}.")
            plain[key] = message[key]
    if calls:
        plain["tool_calls"] = [
            _plain_call(call, f"{where}.tool_calls[{i}]", parse_arguments) for i, call in enumerate(calls)
        ]
    return plain


def _plain_call(call: Any, where: str, parse_arguments: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where}: expected {{"type": "function", "function": {{"name": .., "arguments": ..}}}}.')
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        raise ValueError(
            f"{where}.function.arguments: expected the text of a JSON object, got {type(arguments).__name__}."
        )
    value: Any = arguments
    if parse_arguments:
        try:
            value = json.loads(arguments)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f"{where}.function.arguments: expected the text of a JSON object; this model's chat template writes its "
                "parts one by one."
            )
    plain = {"type": "function", "function": {"name": function["name"], "arguments": value}}
    return plain if call.get("id") is None else {"id": str(call["id"]), **plain}


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where}: expected {{"type": "text", "text": ...}}; other parts are not supported.')
    return str(part["text"])
