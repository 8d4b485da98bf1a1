"""What clients receive: completions whole and in chunks, counts of tokens, errors. Pure functions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_jax.serve.reply import Piece


@dataclass
class Usage:
    """Tokens of an answer: all choices together."""

    prompt: int = 0
    cached: int = 0  # tokens of the prompt that were not computed
    completion: int = 0
    reasoning: int = 0  # tokens of the completion that are thought

    def as_dict(self) -> dict[str, Any]:
        """As clients of DeepSeek and of OpenAI read it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.prompt - self.cached,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


dumps = json.JSONEncoder(ensure_ascii=False).encode


def head(kind: str, number: str, model: str, created: int) -> dict[str, Any]:
    """What every body and every chunk of an answer begins with; `kind` is chat.completion or its chunk, and so on."""
    return {"id": number, "object": kind, "created": created, "model": model, "system_fingerprint": None}


def chat_choice(index: int, message: dict[str, Any], reason: str, calls: str) -> dict[str, Any]:
    """A whole message; `calls` begins the ids of its tool calls."""
    message = message | {"content": message["content"] or None if "tool_calls" in message else message["content"]}
    if "tool_calls" in message:
        message["tool_calls"] = [call | {"id": f"{calls}{n}"} for n, call in enumerate(message["tool_calls"])]
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def chat_delta(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """One step of a streamed message."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def piece_delta(piece: Piece, calls: str) -> dict[str, Any]:
    """A piece of a message; a thought and content are never in one."""
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "thought":
        return {"reasoning_content": piece.text}
    function: dict[str, Any] = {"arguments": piece.text}
    if not piece.name:
        return {"tool_calls": [{"index": piece.number, "function": function}]}
    call = {"index": piece.number, "id": f"{calls}{piece.number}", "type": "function"}
    return {"tool_calls": [call | {"function": {"name": piece.name} | function}]}


def text_choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    """A text, or a step of one."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of one kind in one piece: fewer chunks."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and not piece.name and (last.kind, last.number) == (piece.kind, piece.number):
            found[-1] = last._replace(text=last.text + piece.text)
        else:
            found.append(piece)
    return found


def event(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else dumps(body)}\n\n"


def error(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of an error, as DeepSeek's server words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}
