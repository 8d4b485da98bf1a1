"""Messages of a conversation as checked turns, and an answer as a message again.

A message is a dict as in DeepSeek's and OpenAI's APIs: `role` (system, user, assistant, tool), `content`, and
optionally `reasoning_content` (or `reasoning`), `tool_calls`, `tool_call_id`. The order is

    system*  ( user  ( assistant with tool_calls  tool+ )*  assistant )*

and may end after any turn; the tool messages that answer all calls of one message are one turn. A message out of order
is rejected with its number, so the templates in `chat` need no further checks.

V3.2 and V4 have more roles and orders (`V32_ORDER`, `V4_ORDER`). The role developer stands where user does; its message
may have `tools` and a `response_format` of its own. In V4 a latest_reminder may precede a message of the user, who may
speak several times, also right after tools; `task` asks for one of the short answers of V4's quick tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError


class User(NamedTuple):
    """A turn of the user."""

    content: str
    task: str = ""  # of V4's quick tokens, "" for none


class Developer(NamedTuple):
    """A turn of a developer, who gives tools and the form of the answer with it."""

    content: str
    tools: tuple[dict, ...] = ()
    response_format: Any = None


class Reminder(NamedTuple):
    """What V4 is reminded of before the user speaks, such as the date."""

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


Turn = User | Developer | Reminder | Assistant | Outputs


class Conversation(NamedTuple):
    """A system prompt, "" if there is none, and turns in a valid order."""

    system: str
    turns: list[Turn]


Order = Mapping[str, tuple[str, ...]]  # the roles that may follow a message
FOLLOWS: Order = {
    "the start": ("system", "user"),
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool_calls": ("tool",),
    "tool": ("assistant",),
    "tool with other calls unanswered": ("tool",),
}


def _with(role: str, order: Order) -> Order:
    """Returns an order in which a role may stand wherever the user may."""
    return {before: (*roles, role) if "user" in roles else roles for before, roles in order.items()}


V32_ORDER: Order = {**_with("developer", FOLLOWS), "developer": ("assistant",)}
V4_ORDER: Order = {
    **_with("latest_reminder", V32_ORDER),
    "latest_reminder": ("user", "developer"),
    "user": ("assistant", "user"),
    "user with a task": ("assistant",),
    "tool": ("assistant", "user"),
}
ANY_ORDER = V4_ORDER  # all that a template may write
TASKS = ("action", "query", "authority", "domain", "title", "read_url")


def read(
    messages: Sequence[dict], join_system: Callable[[list[str]], str] = "\n\n".join, follows: Order = FOLLOWS
) -> Conversation:
    """Returns messages as a conversation.

    `join_system` joins all system prompts; the default puts a blank line between them. `follows` are the roles and
    their order. Raises UserError for a message that does not follow it.
    """
    system: list[str] = []
    turns: list[Turn] = []
    before = "the start"
    ids: list = []  # of the latest calls
    outputs: list[str | None] = []  # of the latest calls, None if one is still missing
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        role = _role(message, before, follows, where)
        before = role
        if role == "system":
            system.append(_text(message, "content", where))
        elif role == "user":
            said = User(_text(message, "content", where), _task(message, follows, where))
            turns.append(said)
            before = "user with a task" if said.task else role
        elif role == "assistant":
            turns.append(read_answer(message, where))
            ids = _call_ids(message, where)
            outputs = [None] * len(ids)
            before = "assistant with tool_calls" if ids else role
        elif role == "tool":
            outputs[_slot(message.get("tool_call_id"), ids, outputs, where)] = _text(message, "content", where)
            if None in outputs:
                before = "tool with other calls unanswered"
            else:
                turns.append(Outputs(tuple(text for text in outputs if text is not None)))
        else:
            turns.append(_special_turn(role, message, where))
    if not turns or before in ("tool with other calls unanswered", "latest_reminder"):
        raise UserError(f"the messages end after {before}. Add a message of {' or '.join(follows[before])}.")
    return Conversation(join_system(system), turns)


def _task(message: dict, follows: Order, where: str) -> str:
    """Returns the task of a user's message, "" for none; where there are no tasks the key is ignored."""
    task = message.get("task") if "user with a task" in follows else None
    if task is not None and task not in TASKS:
        raise UserError(f"{where} has task {task!r}. Expected one of {', '.join(TASKS)}.")
    return task or ""


def _special_turn(role: str, message: dict, where: str) -> Turn:
    """Returns a turn of V3.2's and V4's further roles."""
    content = _text(message, "content", where)
    if role == "latest_reminder":
        return Reminder(content)
    tools = message.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise UserError(f"{where} has {type(tools).__name__} as tools. Expected a list.")
    return Developer(content, tuple(tools), message.get("response_format"))


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


def _role(message: dict, before: str, follows: Order, where: str) -> str:
    """Returns the role of a message after checking that it may follow `before`."""
    role = message.get("role") if isinstance(message, dict) else message
    roles = [*dict.fromkeys(one for after in follows.values() for one in after)]
    if role not in roles:
        raise UserError(f"{where} has role {role!r}. Expected a dict whose role is one of {', '.join(roles)}.")
    if role not in follows[before]:
        raise UserError(f"{where} has role {role!r} after {before}. Expected {' or '.join(follows[before])}.")
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
