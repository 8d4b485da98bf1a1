"""Conversations as tokens of which only the assistant's answers are learnt: supervised fine-tuning.

A conversation becomes one or more examples, each a sequence of tokens of which some are learnt:

    example  =  prompt answer rest answer …        only the answers are learnt, with their end tokens

`answer` is `reply` of `data.chat`. The tokens before it are exactly the prompt at inference: `parts` of the messages
before. If a template rewrites earlier messages (R1's leave out earlier thoughts), the prompt of a later answer does not
continue the example so far, and a new example starts. So every answer is learnt in the context it has at inference.

The prompt of an answer with a thought has `thinking` set, unless the row says otherwise; V3.2 and V4 think in a whole
round of calls or not at all. If the template has thoughts,
`<think>…</think>` at the start of the content counts as a thought.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from deepseek_jax.data import chat
from deepseek_jax.data.rows import RowError, counts
from deepseek_jax.data.tokenizer import MarkEncoder, Tokenizer
from deepseek_jax.errors import UserError

VERSION = 1  # increase it when the tokens of a conversation change, so that cached ones are not used
TRAIN_ON = ("answers", "last")


class Answer(NamedTuple):
    """An answer to learn, and the prompt before it."""

    prompt: list[chat.Part]
    reply: list[chat.Part]


class Example(NamedTuple):
    """Tokens (int32) and which of them are learnt (bool)."""

    ids: np.ndarray
    is_learnt: np.ndarray


def answers(conversation: dict, template: chat.Template, train_on: str) -> list[Answer]:
    """Returns the answers that are learnt from a conversation.

    `conversation` has `messages`, and optionally `tools` and `thinking`; `train_on` is "answers" for all messages of
    the assistant except those of weight 0, "last" for the last of these. Raises UserError if the template cannot
    express something in the conversation.
    """
    messages, tools = conversation["messages"], conversation.get("tools", ())
    places = [n for n, message in enumerate(messages) if counts(message, f"messages[{n}]")]
    apart = [_thought_apart(message) if template.thinks else (message, False) for message in messages]
    earlier = [message for message, _ in apart] if template.keeps_thoughts else messages
    found = []
    for n in places if train_on == "answers" else places[-1:]:
        thinking = _is_thinking(conversation, apart, n, template)
        prompt = template.prompt(earlier[:n], tools, thinking, conversation.get("reasoning_effort", ""))
        message, thought = apart[n][0], _thought(apart[n][0])
        reply = template.reply(message, thinking and not chat.is_task(prompt))
        if thought not in chat.spell(reply):
            raise UserError(f"messages[{n}] has a thought, which the chat template does not write there. Remove it.")
        found.append(Answer(prompt, reply))
    return found


def _is_thinking(conversation: dict, apart: list[tuple[dict, bool]], n: int, template: chat.Template) -> bool:
    """Returns whether answer `n` is given by a model that thinks; `apart` are all messages by `_thought_apart`.

    Where thoughts are kept across tools, one of them counts for all answers up to the next message of the user.
    """
    asks = [place for place, (message, _) in enumerate(apart) if message["role"] in ("user", "developer")]
    first = max((place for place in asks if place < n), default=-1)
    end = min((place for place in asks if place > n), default=len(apart))
    if not template.keeps_thoughts:
        first, end = n - 1, n + 1
    thinks = any(is_spelled or _thought(message) for message, is_spelled in apart[first + 1 : end])
    return conversation.get("thinking", thinks) and (template.keeps_thoughts or apart[n - 1][0]["role"] == "user")


def _thought(message: dict) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _thought_apart(message: dict) -> tuple[dict, bool]:
    """Returns an answer with the thought in its content moved to its own key, and whether there was one."""
    blank, opening, rest = (message.get("content") or "").partition(chat.THINK.text)
    thought, end, content = rest.partition(chat.END_THINK.text)
    if message["role"] != "assistant" or blank.strip() or not opening or not end or _thought(message):
        return message, False
    thought = thought.removeprefix("\n").removesuffix("\n")
    return {**message, "content": content.removeprefix("\n\n"), "reasoning_content": thought}, True


def join(found: Iterable[Answer], tokenizer: MarkEncoder) -> list[Example]:
    """Returns answers as examples; an answer whose prompt continues the previous example extends that example."""
    examples: list[Example] = []
    for prompt, reply in found:
        before, answer = chat.to_ids(prompt, tokenizer), chat.to_ids(reply, tokenizer)
        start = Example(before[:0], np.zeros(0, bool))
        if examples and np.array_equal(before[: len(examples[-1].ids)], examples[-1].ids):
            start = examples.pop()
        rest = np.zeros(len(before) - len(start.ids), bool)
        is_learnt = np.concatenate([start.is_learnt, rest, np.ones(len(answer), bool)])
        examples.append(Example(np.concatenate([before, answer]), is_learnt))
    return examples


# A stored token is FLAGS * id + (STARTS if an example starts there) + (LEARNT if it is learnt).
LEARNT, STARTS, FLAGS = 1, 2, 4


def flatten(examples: Sequence[Example]) -> np.ndarray:
    """Returns examples as one int64 array."""
    arrays = [FLAGS * ids.astype(np.int64) + LEARNT * is_learnt for ids, is_learnt in examples]
    for array in arrays:
        array[0] += STARTS
    return np.concatenate(arrays)


def unflatten(stored: ArrayLike) -> list[Example]:
    """Returns the examples of `flatten`."""
    stored = np.asarray(stored)
    starts = np.flatnonzero(stored & STARTS)
    parts = np.split(stored, starts[1:])
    return [Example((part // FLAGS).astype(np.int32), (part & LEARNT).astype(bool)) for part in parts]


def template_name(name: str, tokenizer: str | Tokenizer) -> str:
    """Returns the name of a corpus's chat template. Raises UserError if there is none, or an unknown one.

    `name` is `data.chat_template`; "" means the one in the folder of `data.tokenizer`.
    """
    if name:
        return chat.template_for(None, name)
    path = Path(tokenizer).expanduser() if isinstance(tokenizer, str) else Path()
    folder = path if path.is_dir() else path.parent
    found = isinstance(tokenizer, str) and path.exists() and chat.published_name(folder)
    if found:
        return found
    raise UserError(
        "conversations need a chat template, and the files of data.tokenizer name no known one. "
        f"Set data.chat_template to one of {', '.join(chat.TEMPLATES)}."
    )


class Encoder:
    """Conversations as JSON to arrays for a `TokenStore`, which takes it in the place of a tokenizer.

    `template` is the name of a chat template, all of whose marks the tokenizer has; `train_on`: see `answers`.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, train_on: str):
        if train_on not in TRAIN_ON:
            raise UserError(f"data.train_on = {train_on!r} does not exist. Choose one of {', '.join(TRAIN_ON)}.")
        self._tokenizer, self._train_on = tokenizer, train_on
        self._template = chat.template(template)
        self.vocab_size = FLAGS * tokenizer.vocab_size
        kind = f"{VERSION} {template} {train_on} {tokenizer.fingerprint}"
        self.fingerprint = hashlib.blake2b(kind.encode(), digest_size=16).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the `flatten`-ed examples of each conversation. Raises RowError if a template cannot express one."""
        found = [self._answers(text, row) for row, text in enumerate(texts)]
        parts = [part for conversation in found for answer in conversation for side in answer for part in side]
        encoded = _Encoded(self._tokenizer, {part.text for part in parts if not part.is_mark})
        return [flatten(join(conversation, encoded)) for conversation in found]

    def _answers(self, text: str, row: int) -> list[Answer]:
        try:
            return answers(json.loads(text), self._template, self._train_on)
        except UserError as error:
            raise RowError(str(error), row) from error


class _Encoded:
    """A tokenizer that has encoded all texts in advance, each of them once (prompts repeat earlier texts)."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]):
        texts = list(texts)
        self._ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
        self._mark: Callable[[str], np.ndarray] = functools.cache(lambda mark: tokenizer.encode(mark, specials=True))

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """Returns the ids of a text or, with `specials`, of a special token."""
        return self._mark(text) if specials else self._ids[text]
