"""Messages of a conversation as checked turns, and an answer as a message again.

A message is a dict as in DeepSeek's and OpenAI's APIs: `role` (system, user, assistant, tool), `content`, and
optionally `reasoning_content` (or `reasoning`), `tool_calls`, `tool_call_id`. The order is

    system*  ( user  ( assistant with tool_calls  tool+ )*  assistant )*

and may end after any turn; the tool messages that answer all calls of one message are one turn. A message out of order
is rejected with its number, so the templates in `chat` need no further checks.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError


class User(NamedTuple):
    """A turn of the user."""

    content: str


class Call(NamedTuple):
    """A tool that the assistant calls, with its arguments as JSON text."""

    name: str
    arguments: str


class Assistant(NamedTuple):
    """A turn of the assistant."""

    content: str
    thought: str
    calls: tuple[Call, ...]


class Outputs(NamedTuple):
    """Results of all tool calls of a turn, in the order of the calls."""

    contents: tuple[str, ...]


class Conversation(NamedTuple):
    """A system prompt, "" if there is none, and turns in a valid order."""

    system: str
    turns: list[User | Assistant | Outputs]


ROLES = ("system", "user", "assistant", "tool")
FOLLOWS = {
    "the start": ("system", "user"),
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool_calls": ("tool",),
    "tool": ("assistant",),
    "tool with other calls unanswered": ("tool",),
}


def read(messages: Sequence[dict], join_system: Callable[[list[str]], str] = "\n\n".join) -> Conversation:
    """Returns messages as a conversation.

    `join_system` joins all system prompts; the default puts a blank line between them.
    """
    system: list[str] = []
    turns: list[User | Assistant | Outputs] = []
    before = "the start"
    ids: list = []  # of the latest calls
    outputs: list[str | None] = []  # of the latest calls, None if one is still missing
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        role = _role(message, before, where)
        before = role
        if role == "system":
            system.append(_text(message, "content", where))
        elif role == "user":
            turns.append(User(_text(message, "content", where)))
        elif role == "assistant":
            turns.append(read_answer(message, where))
            ids = _call_ids(message, where)
            outputs = [None] * len(ids)
            before = "assistant with tool_calls" if ids else role
        else:
            outputs[_slot(message.get("tool_call_id"), ids, outputs, where)] = _text(message, "content", where)
            if None in outputs:
                before = "tool with other calls unanswered"
            else:
                turns.append(Outputs(tuple(text for text in outputs if text is not None)))
    if not turns or before == "tool with other calls unanswered":
        raise UserError(f"the messages end after {before}. Add a message of {' or '.join(FOLLOWS[before])}.")
    return Conversation(join_system(system), turns)


def read_answer(message: dict, where: str = "the message") -> Assistant:
    """Returns an assistant's message as a turn; its content may be None beside tool calls."""
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise UserError(f"{where} has tool_calls of {calls!r}. Expected a list.")
    thought = "reasoning_content" if message.get("reasoning_content") is not None else "reasoning"
    return Assistant(
        content=_text(message, "content", where, optional=bool(calls)),
        thought=_text(message, thought, where, optional=True),
        calls=tuple(_call(call, f"{where}, tool_calls[{n}]") for n, call in enumerate(calls)),
    )


def _role(message: dict, before: str, where: str) -> str:
    """Returns the role of a message after checking that it may follow `before`."""
    role = message.get("role") if isinstance(message, dict) else message
    if role not in ROLES:
        raise UserError(f"{where} has role {role!r}. Expected a dict whose role is one of {', '.join(ROLES)}.")
    if role not in FOLLOWS[before]:
        raise UserError(f"{where} has role {role!r} after {before}. Expected {' or '.join(FOLLOWS[before])}.")
    return role


def _text(message: dict, key: str, where: str, optional: bool = False) -> str:
    """Returns the text under `key`; "" if it is missing and optional."""
    text = message.get(key)
    if not isinstance(text, str) and not (optional and text is None):
        raise UserError(f"{where} has {type(text).__name__} as {key}. Expected text.")
    return text or ""


def _call_ids(message: dict, where: str) -> list:
    """Returns the id of each call of a message, None for a call without one; no two may be equal."""
    ids = [call.get("id") for call in message.get("tool_calls") or ()]
    twice = next((i for i in ids if i is not None and ids.count(i) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two tool_calls with the id {twice!r}. Give each call an id of its own, or none.")
    return ids


def _call(call: dict, where: str) -> Call:
    """Returns a call: {"type": "function", "function": {"name": …, "arguments": JSON as text or a dict}}."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name") or call.get("type", "function") != "function":
        raise UserError(f'{where} is {call!r}. Expected {{"type": "function", "function": {{"name", "arguments"}}}}.')
    arguments = function.get("arguments")
    arguments = "{}" if arguments is None else arguments  # a call without arguments, as some clients send it
    arguments = arguments if isinstance(arguments, str) else as_json(arguments, where)
    return Call(_text(function, "name", where), arguments)


def _slot(call_id: str | None, ids: list, outputs: list, where: str) -> int:
    """Returns which call a tool message answers: by its id, otherwise the first without an answer."""
    if call_id is None or not any(ids):
        return outputs.index(None)
    if call_id not in ids or outputs[ids.index(call_id)] is not None:
        waiting = ", ".join(repr(i) for i, output in zip(ids, outputs, strict=True) if output is None)
        raise UserError(f"{where} has tool_call_id {call_id!r}. Calls without an answer: {waiting}.")
    return ids.index(call_id)


def as_json(value: object, where: str, **layout: Any) -> str:
    """Returns a value as JSON as the published templates write it: keys in order, every character unchanged.

    `where` names the value in errors, `layout` is as for `json.dumps`.
    """
    try:
        return json.dumps(value, ensure_ascii=False, **layout)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be written as JSON ({error}). Give text, numbers, lists and dicts.") from error


def functions(tools: Sequence[dict]) -> list[dict]:
    """Returns the functions of tools, each {"type": "function", "function": {"name", "description", "parameters"}}."""
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f'a tool is {tool!r}. Expected {{"type": "function", "function": {{"name": …, …}}}}.')
        found.append(function)
    return found


def as_message(content: str, thought: str = "", calls: Sequence[Call] = ()) -> dict:
    """Returns an answer as a message, without keys for missing values."""
    message: dict = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for n, call in enumerate(calls)
        ]
    return message
