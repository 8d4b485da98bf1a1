r"""A model's ids, as they arrive, to the pieces of its message: thought, content, tool calls.

    reply = Reply(template, tokenizer, thinking=True, stop=["\n\n"])
    for ids in …:
        for piece in reply.push(ids): …
    reply.finish(), reply.message(), reply.has_stopped

A piece is final when it is returned, and pieces come as early as they are certain. What could still turn out to belong
to the format is held back: half a character, the line breaks around a thought, the beginning of a stop string, the end
of a call's arguments, the `<` of a tag. However the ids are divided into pushes, the pieces join to the same message:
a streamed answer and a whole one are made by the same code.

Special tokens are recognised by their ids: text that spells one is text. Well-formed answers give what the template's
`parse` gives. Of malformed ones a stream cannot take back what it has shown, so here a call counts from its name on,
and `</think>` without a thought is text; what is not a block of calls, or no longer one, is content.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

from deepseek_jax.data.chat import END_THINK, TEMPLATES, THINK, Template
from deepseek_jax.data.chat.dsml import OPENINGS, BlockReader, Step
from deepseek_jax.data.chat.marks import CALL, CALLS, DSML, END_CALL, END_CALLS, SEP, Part
from deepseek_jax.data.chat.parts import CallFormat, overlap
from deepseek_jax.data.messages import Call, as_message
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.text import TextStream

LETTER = "\udfff"  # stands for the special token of a tag, since it occurs in no text
PLAIN = replace(TEMPLATES["v3"], call_format=None)  # a text without thought and calls


class Piece(NamedTuple):
    """Part of a message.

    A call begins with a piece that has its `name`; `number` counts the calls of the message; `text` is added to the
    arguments.
    """

    kind: Literal["thought", "content", "call"]
    text: str
    number: int = 0
    name: str = ""

    @property
    def is_thought(self) -> bool:
        """Whether this is part of the thought before the answer."""
        return self.kind == "thought"


class Reply:
    """The message so far.

    Args:
        template: format of the answer.
        tokenizer: tokenizer of the model.
        thinking: whether the prompt has opened a thought.
        continues: whether the prompt has begun the thought (with `thinking`) or else the content.
        stop: strings that end the content; they are not part of it, and are not searched for in thoughts and calls.

    Attributes:
        has_stopped: whether a stop string was found; ids after it are ignored, and so are those after the end mark.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        thinking: bool = False,
        stop: Sequence[str] = (),
        continues: bool = False,
    ):
        self.has_stopped, self._has_ended = False, False
        self._template, self._tokenizer, self._stop = template, tokenizer, tuple(text for text in stop if text)
        self._marks = _marks(template, tokenizer)
        self._texts = {"thought": "", "content": ""}
        self._calls: list[Call] = []
        spaces = template.spaces
        content = self._content("" if continues else spaces.before_answer, is_first=not continues)
        self._segment: _Segment = self._thought("") if thinking else content
        self._stream = TextStream(tokenizer.decode)

    def push(self, ids: Sequence[int]) -> list[Piece]:
        """Returns the pieces that have become final."""
        pieces: list[Piece] = []
        for token in map(int, ids):
            if self._has_ended or self.has_stopped:
                break
            mark = self._marks.get(token)
            if mark == THINK and self._is_blank():
                pieces += self._add(self._segment.push(self._flush()))  # half a character is not a blank
            following = self._following(mark) if mark else None
            if mark == self._template.end:
                pieces += self.finish()
            elif mark == SEP and isinstance(self._segment, _Call):
                pieces += self._add(self._segment.push(self._flush() + SEP.text))
            elif mark == DSML:
                pieces += self._read(self._flush())
                pieces += self._read_tag()
            elif following:
                pieces += self._close()
                self._segment = following
            else:
                pieces += self._read(self._stream.push(token))
        return pieces

    def finish(self) -> list[Piece]:
        """Returns the rest."""
        if self._has_ended or self.has_stopped:
            return []
        self._has_ended = True
        return self._close()

    def message(self) -> dict:
        """Returns what was returned in pieces, as a message."""
        return as_message(self._texts["content"], self._texts["thought"], self._calls)

    @property
    def is_in_thought(self) -> bool:
        """Whether the next token belongs to the thought, unless it ends it."""
        return isinstance(self._segment, _Text) and self._segment.kind == "thought"

    def _following(self, mark: Part) -> "_Segment | None":
        """What begins at a special token; None if it means nothing here."""
        segment, spaces, call_format = self._segment, self._template.spaces, self._template.call_format
        if mark == THINK and self._is_blank():
            self._segment = _Text("content", "", "")  # without the blanks
            return self._thought(spaces.before_thought)
        if mark == END_THINK and self.is_in_thought:
            return self._content(spaces.before_content)
        is_outside = isinstance(segment, _Between) or (isinstance(segment, _Text) and segment.kind == "content")
        if mark == CALLS and is_outside:
            return _Between()
        if mark == CALL and isinstance(segment, _Between) and call_format:
            return _Call(call_format, len(self._calls))
        ends = {END_CALLS: _Between, END_CALL: _Call}
        return _Between() if mark in ends and isinstance(segment, ends[mark]) else None

    def _is_blank(self) -> bool:
        """Whether a thought may still begin."""
        return isinstance(self._segment, _Text) and self._segment.is_blank

    def _thought(self, head: str) -> "_Text":
        return _Text("thought", head, self._template.spaces.after_thought)

    def _content(self, head: str, is_first: bool = False) -> "_Text":
        holds_blanks = is_first and self._template.thinks
        held = OPENINGS if self._template.call_block else ()
        return _Text("content", head, self._template.spaces.after_content, self._stop, holds_blanks, held)

    def _read(self, text: str) -> list[Piece]:
        return self._add(self._segment.push(text)) + self._given_back()

    def _read_tag(self) -> list[Piece]:
        """The special token of a tag: it begins a block of calls after content, and is text elsewhere."""
        segment = self._segment
        if isinstance(segment, _Block):
            return self._read(LETTER)
        is_content = isinstance(segment, _Text) and segment.kind == "content" and not self.has_stopped
        released, opening = segment.cut(OPENINGS) if is_content and isinstance(segment, _Text) else ([], "")
        if not opening:
            return self._read(DSML.text)
        pieces = self._add(released)
        self._segment = _Block(self._template.call_block, opening, len(self._calls))
        return pieces

    def _given_back(self) -> list[Piece]:
        """The content in what is not, or no longer, a block of calls; it may hold the next one."""
        rest = self._segment.rest if isinstance(self._segment, _Block) else None
        if rest is None:
            return []
        self._segment = self._content("")
        first, *others = rest.split(LETTER)
        pieces = self._read(first)
        for text in others:
            if not self.has_stopped:
                pieces += self._read_tag() + self._read(text)
        return pieces

    def _close(self) -> list[Piece]:
        pieces = self._read(self._flush())
        is_closed = False
        while not is_closed and not self.has_stopped:
            segment = self._segment
            pieces += self._add(segment.close()) + self._given_back()
            is_closed = segment is self._segment
        return pieces

    def _flush(self) -> str:
        """The rest of the text before a special token."""
        rest, self._stream = self._stream.finish(), TextStream(self._tokenizer.decode)
        return rest

    def _add(self, pieces: list[Piece]) -> list[Piece]:
        self.has_stopped = isinstance(self._segment, _Text) and self._segment.has_stopped
        for kind, text, number, name in pieces:
            if kind != "call":
                self._texts[kind] += text
            elif name:
                self._calls.append(Call(name, text))
            else:
                call = self._calls[number]
                self._calls[number] = call._replace(arguments=call.arguments + text)
        return pieces


class _Segment(Protocol):
    """The text between two special tokens, as it arrives."""

    def push(self, text: str) -> list[Piece]:
        """Returns the pieces that have become final."""

    def close(self) -> list[Piece]:
        """Returns the rest."""


class _Text:
    """A thought or content, without `head` at its start, `tail` at its end, and what follows one of the `stops`.

    With `holds_blanks`, blanks at its start wait for a letter: a thought may still follow. One of the `openings` at its
    end waits too: a block of calls may follow (`cut`).
    """

    def __init__(
        self,
        kind: Literal["thought", "content"],
        head: str,
        tail: str,
        stops: tuple[str, ...] = (),
        holds_blanks: bool = False,
        openings: tuple[str, ...] = (),
    ):
        self.kind, self.has_stopped, self.is_blank = kind, False, holds_blanks
        self._head, self._tail, self._stops, self._held = head, tail, stops, ""
        self._waits_for = (tail, *stops, *openings)

    def push(self, text: str) -> list[Piece]:
        self._held += text
        self.is_blank = self.is_blank and not self._held.strip()
        if self.is_blank or (self._head.startswith(self._held) and self._held != self._head):
            return []
        self._held, self._head = self._held.removeprefix(self._head), ""
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in self._held]
        if found:
            end, minus_length = min(found)  # the one that is complete first
            self.has_stopped = True
            return self._release(end + minus_length)
        return self._release(len(self._held) - max(overlap(self._held, text) for text in self._waits_for))

    def close(self) -> list[Piece]:
        self._held = self._held.removeprefix(self._head).removesuffix(self._tail)
        return self._release(len(self._held))

    def cut(self, openings: tuple[str, ...]) -> tuple[list[Piece], str]:
        """Returns all that was held before the first of the `openings` that ends the text, and this; "" for none."""
        opening = next((one for one in openings if self._held.endswith(one)), "")
        return (self._release(len(self._held) - len(opening)), opening) if opening else ([], "")

    def _release(self, n: int) -> list[Piece]:
        text, self._held = self._held[:n], self._held[n:]
        return [Piece(self.kind, text)] if text else []


class _Between:
    """What is written around calls: nothing, or content after all."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[Piece]:
        self._text += text
        return []

    def close(self) -> list[Piece]:
        return [Piece("content", self._text)] if self._text.strip() else []


class _Call:
    """A call. Its text is content if it ends before the name of a function did."""

    def __init__(self, call_format: CallFormat, number: int):
        self._format, self._number, self._body = call_format, number, ""
        self._arguments: _Text | None = None

    def push(self, text: str) -> list[Piece]:
        self._body += text
        if self._arguments:
            return self._renamed(self._arguments.push(text))
        call = self._format.begun(self._body)
        if not call:
            return []
        self._arguments = _Text("content", "", self._format.after_arguments)
        return [Piece("call", "", self._number, call.name), *self._renamed(self._arguments.push(call.arguments))]

    def close(self) -> list[Piece]:
        if self._arguments:
            return self._renamed(self._arguments.close())
        return [Piece("content", CALL.text + self._body)] if self._body.strip() else []

    def _renamed(self, pieces: list[Piece]) -> list[Piece]:
        return [Piece("call", text, self._number) for _, text, *_ in pieces]


class _Block:
    """A block of calls in DSML. What is not one is given back in `rest`, the special tokens of later tags as `LETTER`.

    `opening` is the text before its first special token; `number` is that of its first call.
    """

    def __init__(self, block: str, opening: str, number: int):
        self.rest: str | None = None
        self._reader, self._opening, self._number = BlockReader(block, LETTER), opening, number

    def push(self, text: str) -> list[Piece]:
        return self._pieces(self._reader.push(text))

    def close(self) -> list[Piece]:
        return self._pieces(self._reader.finish())

    def _pieces(self, steps: list[Step]) -> list[Piece]:
        pieces = []
        for name, text in steps:
            self._number += bool(name)
            pieces += [Piece("call", text, self._number - 1, name)] if name or text else []
        if self._reader.rest is not None:
            self.rest = ("" if self._reader.n_calls else self._opening + DSML.text) + self._reader.rest
        return pieces


def _marks(template: Template, tokenizer: Tokenizer) -> dict[int, Part]:
    """The ids of the special tokens that the template's answers may contain, as far as the tokenizer has them."""
    marks = [template.end]
    marks += [THINK, END_THINK] if template.thinks else []
    marks += [CALLS, END_CALLS, CALL, END_CALL, SEP] if template.call_format else []
    marks += [DSML] if template.call_block else []
    ids = {mark: tokenizer.encode(mark.text, specials=True) for mark in marks}
    return {int(id_[0]): mark for mark, id_ in ids.items() if len(id_) == 1}
