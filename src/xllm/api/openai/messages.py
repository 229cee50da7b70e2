"""Chat messages and tools as clients write them, checked and put into the form templates expect.

Text only. Content parts are joined by newlines; tool-call arguments become objects; `developer`
becomes `system`.
"""

from __future__ import annotations

import re
from typing import Any

from xllm.api.fields import Fields, as_list, as_object, bad_value, read_items, unsupported, wrong_type
from xllm.api.json_body import parse_nested
from xllm.errors import RequestError

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Message = dict[str, Any]


def read_messages(fields: Fields) -> list[Message]:
    """The conversation. Raises RequestError with the path of what is wrong."""
    value = as_list(fields.require("messages"), "messages")
    if not value:
        raise bad_value("messages", "must not be empty")
    messages = list(read_items(value, "messages", _message, MAX_MESSAGES))
    _check_tool_ids(messages)
    return messages


def read_tools(fields: Fields) -> list[dict[str, Any]] | None:
    """Tools for the template. What would need a parser of the model's output is refused by name."""
    value = fields.take("tools")
    choice = fields.take("tool_choice")
    fields.boolean("parallel_tool_calls", True)
    tools = list(read_items(as_list(value, "tools"), "tools", _tool, MAX_TOOLS)) if value is not None else []
    names = [t["function"]["name"] for t in tools]
    if len(set(names)) != len(names):
        raise bad_value("tools", "must not name a function twice")
    if isinstance(choice, dict) or choice == "required":
        raise unsupported("tool_choice", "may only be auto or none: forced calls are not built yet")
    if choice not in (None, "auto", "none"):
        raise bad_value("tool_choice", "may only be auto or none")
    return tools if tools and choice != "none" else None


def _message(value: Any, path: str) -> Message:
    fields = Fields(as_object(value, path), path)
    role = fields.require("role")
    if not isinstance(role, str):
        raise wrong_type(fields.at("role"), "a string")
    if role not in _ROLES:
        raise bad_value(fields.at("role"), "must be system, developer, user, assistant or tool")
    message: Message = {"role": _ROLES[role]}
    calls = fields.items("tool_calls", _tool_call, MAX_TOOL_CALLS) if role == "assistant" else None
    if calls:
        message["tool_calls"] = list(calls)
    message["content"] = _content(fields, optional=bool(calls))
    if role == "tool":
        fields_id = fields.require("tool_call_id")
        message["tool_call_id"] = (
            fields_id if isinstance(fields_id, str) else _not_string(fields, "tool_call_id")
        )
    if (name := fields.string("name", max_chars=256)) is not None:
        message["name"] = name
    if (thought := fields.string("reasoning_content")) is not None:
        message["reasoning_content"] = thought
    return message


def _not_string(fields: Fields, name: str) -> str:
    raise wrong_type(fields.at(name), "a string")


def _content(fields: Fields, *, optional: bool) -> str:
    path = fields.at("content")
    value = fields.take("content") if optional else fields.require("content")
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(path, "a string or a list of parts")
    if not value:
        raise bad_value(path, "must not be empty")
    return "\n".join(read_items(value, path, _part, MAX_PARTS))


def _part(value: Any, path: str) -> str:
    fields = Fields(as_object(value, path), path)
    kind = fields.require("type")
    if kind != "text":
        raise unsupported(fields.at("type"), "may only be text: this model takes no other input")
    text = fields.require("text")
    if not isinstance(text, str):
        raise wrong_type(fields.at("text"), "a string")
    return text


def _tool_call(value: Any, path: str) -> dict[str, Any]:
    fields = Fields(as_object(value, path), path)
    call_id = fields.require("id")
    function = Fields(as_object(fields.require("function"), fields.at("function")), fields.at("function"))
    name = function.require("name")
    arguments = function.require("arguments")
    if not isinstance(call_id, str) or not isinstance(name, str) or not isinstance(arguments, str):
        raise wrong_type(path, "a call with id, function.name and function.arguments as strings")
    try:
        parsed = parse_nested(arguments or "{}")
    except RequestError:
        raise bad_value(function.at("arguments"), "must hold a JSON object") from None
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": parsed}}


def _tool(value: Any, path: str) -> dict[str, Any]:
    fields = Fields(as_object(value, path), path)
    if fields.require("type") != "function":
        raise bad_value(fields.at("type"), "must be function")
    function = Fields(as_object(fields.require("function"), fields.at("function")), fields.at("function"))
    name = function.require("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise bad_value(function.at("name"), "must be 1 to 64 letters, digits, underscores or hyphens")
    out: dict[str, Any] = {"name": name}
    if (description := function.string("description")) is not None:
        out["description"] = description
    if (parameters := function.obj("parameters")) is not None:
        out["parameters"] = parameters
    if function.boolean("strict"):
        raise unsupported(function.at("strict"), "is not supported: constrained output is not built yet")
    return {"type": "function", "function": out}


def _check_tool_ids(messages: list[Message]) -> None:
    known: set[str] = set()
    for i, message in enumerate(messages):
        known.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] == "tool" and message["tool_call_id"] not in known:
            raise bad_value(f"messages[{i}].tool_call_id", "names no call of an earlier message")
