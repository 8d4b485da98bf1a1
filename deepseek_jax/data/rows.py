"""A row of a file as a document: its text, or its conversation in a canonical form.

A row of a corpus of conversations is `{"messages": [...]}` as in DeepSeek's and OpenAI's APIs, optionally with
`"tools"`, a list, `"thinking"`, true or false, and `"reasoning_effort"`, which V4's template reads ("max"). A list may
be given as JSON text, as tables store it. An answer with `"weight": 0` is context only: the model does not learn it.
"""

import json
from typing import Any

from deepseek_jax.data.messages import ANY_ORDER, read
from deepseek_jax.errors import UserError


class RowError(UserError):
    """What is wrong with one of several rows.

    Args:
        message: for the user.
        row: which of the rows, from 0.
    """

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row


FORMATS = ("text", "conversations")
CONVERSATION = ("messages", "tools", "thinking", "reasoning_effort")  # fields of a row; the first is required


def format_of(row: Any, text_key: str, where: str) -> str:
    """Returns which of `FORMATS` a row has.

    Raises UserError if it could have either, or it is a conversation in another spelling.
    """
    if isinstance(row, dict) and text_key not in row:
        _check_spelling(row, where)
    if not isinstance(row, dict) or "messages" not in row:
        return "text"
    if text_key in row:
        raise UserError(
            f"{where} has a text in {text_key!r} and messages too. Set data.format to text or conversations."
        )
    return "conversations"


def _check_spelling(row: dict, where: str) -> None:
    """Raises UserError for a conversation in another spelling."""
    if "conversations" in row and "messages" not in row:
        raise UserError(
            f'{where} has "conversations". Rename it to "messages", with "role" (system, user, assistant, tool) and '
            '"content" in place of "from" and "value".'
        )


def row_text(row: Any, text_key: str, where: str) -> str:
    """Returns the text of a row: the field `text_key` of an object, a string itself, "" for null.

    A lone surrogate, which UTF-8 text cannot contain, becomes `?`.
    """
    row = {text_key: row} if row is None or isinstance(row, str) else row
    if not isinstance(row, dict):
        raise UserError(f"{where} is a JSON {type(row).__name__}, not an object with a field that holds the text.")
    if text_key not in row:
        raise UserError(f"{where} has fields {', '.join(row) or 'none'} and no {text_key!r}. Set data.text_key.")
    text = "" if row[text_key] is None else row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} in {text_key!r}, not text. Fix it or set data.text_key.")
    return text.encode("utf-8", "replace").decode()


def conversation_text(row: Any, where: str) -> str:
    """Returns the conversation of a row as JSON, so that equal conversations are equal documents.

    Raises UserError if there are no messages, their order is invalid, or none is the assistant's.
    """
    if isinstance(row, dict):
        _check_spelling(row, where)
    if not isinstance(row, dict) or "messages" not in row:
        has = f"fields {', '.join(row) or 'none'}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no messages ({has}). Fix or remove the row.")
    messages = [_without_nulls(message) for message in _list(row, "messages", where)]
    try:
        read(messages, follows=ANY_ORDER)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(counts(message, f"{where}: messages[{n}]") for n, message in enumerate(messages)):
        raise UserError(f"{where} has no answer of the assistant to learn. Remove the row.")
    if not isinstance(row.get("thinking"), bool | None):
        raise UserError(f"{where} has {row['thinking']!r} as thinking. Give true or false, or remove the key.")
    if not isinstance(row.get("reasoning_effort"), str | None):
        raise UserError(f"{where} has {row['reasoning_effort']!r} as reasoning_effort. Give text, or remove the key.")
    conversation: dict[str, Any] = {"messages": messages, "tools": _list(row, "tools", where)}
    conversation |= {key: row.get(key) for key in ("thinking", "reasoning_effort")}
    given = {key: value for key, value in conversation.items() if value not in (None, [])}
    return json.dumps(given, ensure_ascii=False).encode("utf-8", "replace").decode()


def counts(message: dict, where: str) -> bool:
    """Returns whether a message is an answer to learn."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{where} has weight {weight!r}. Give 1, or 0 for an answer that is context only.")
    return message["role"] == "assistant" and weight == 1


def _without_nulls(message: Any) -> Any:
    """Returns a message without the keys that a table fills with null."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


def _list(row: dict, key: str, where: str) -> list:
    """Returns a list of a row, [] if there is none."""
    value = row.get(key)
    try:
        found = json.loads(value) if isinstance(value, str) and value else value or []
    except ValueError as error:
        raise UserError(f"{where} has {key} that are not JSON ({error}). Fix or remove the row.") from error
    if not isinstance(found, list):
        raise UserError(f"{where} has a {type(found).__name__} as {key}. Give a list.")
    return found
