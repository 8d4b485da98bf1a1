r"""Tool calls of V3.2 and V4 in DSML, DeepSeek's markup: the special token `｜DSML｜` inside tags that are text.

    \n\n<｜DSML｜BLOCK>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">a string as it is</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">any other value as JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜BLOCK>

BLOCK is `function_calls` in V3.2 and `tool_calls` in V4. A string may contain anything, tags that are spelled as text
included: only the special token makes a tag. Values that are not strings are passed on as written, even if they are not
JSON. More is read than is written: any blanks may stand between tags.

Source: encoding_dsv32.py and encoding_dsv4.py in the models' own folders.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_jax.data.chat.marks import DSML
from deepseek_jax.data.chat.parts import Pieces, overlap
from deepseek_jax.data.messages import Call, as_json

OPENINGS = ("\n\n<", "<")  # before the special token of a block; the line breaks do not belong to the content


def write_calls(calls: Sequence[Call], block: str) -> Pieces:
    """Returns the block of some calls; nothing for none."""
    if not calls:
        return []
    pieces: Pieces = [OPENINGS[0], DSML, f"{block}>\n"]
    for name, arguments in calls:
        pieces += ["<", DSML, f'invoke name="{name}">\n', *_parameters(arguments), "\n</", DSML, "invoke>\n"]
    return [*pieces, "</", DSML, f"{block}>"]


def _parameters(arguments: str) -> Pieces:
    pieces: Pieces = []
    for key, value in _as_dict(arguments).items():
        kind, text = ("true", value) if isinstance(value, str) else ("false", as_json(value, key))
        pieces += ["\n", "<", DSML, f'parameter name="{key}" string="{kind}">{text}</', DSML, "parameter>"]
    return pieces[1:]


def _as_dict(arguments: str) -> dict:
    """Returns arguments as parameters; those that are not a JSON object become one parameter, as in V4's encoder."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def split_calls(text: str, block: str) -> tuple[str, list[Call]]:
    """Returns the content and the calls after it.

    All or none: unless their block is complete and every call is valid, they stay in the content, tags included, so
    that half a call is never run.
    """
    before, tag, _ = text.partition(f"<{DSML.text}{block}>")
    if not tag:
        return text, []
    reader, calls = BlockReader(block), list[Call]()
    for name, arguments in reader.push(text[len(before) + len(tag) - len(block) - 1 :]):
        if name:
            calls.append(Call(name, ""))
        calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + arguments)
    return (before.removesuffix(OPENINGS[0][:-1]), calls) if reader.is_whole else (text, [])


class Step(NamedTuple):
    """Continues a block: a call begins if there is a `name`, and `text` is added to its arguments, which are JSON."""

    name: str
    text: str


class _Broken(Exception):
    """The text is not, and will not become, what may stand here."""


class BlockReader:
    """Reads a block of calls as it arrives, from what follows its first `｜DSML｜` on.

    However the text is divided into pushes, the steps join to the same calls, and `rest` is the same in the end.

    Args:
        block: name of the block.
        mark: what stands for `｜DSML｜` in the text; a stream gives a letter here that no text contains.

    Attributes:
        rest: text after the block, or from where it is no longer one; None if there is none. Without a call it is all
            that was pushed.
        n_calls: calls that have begun.
    """

    def __init__(self, block: str, mark: str = DSML.text):
        self.rest: str | None = None
        self.n_calls = 0
        self._mark, self._end = mark, (f"</{mark}{block}>",)
        self._start = (f"{block}>",)
        self._held, self._before_calls, self._keys, self._is_string = "", "", list[str](), False
        self._read: Callable[[], bool] = self._at_start  # reads a part and returns whether it did, or waits for more
        self._steps: list[Step] = []

    @property
    def is_whole(self) -> bool:
        """Whether the block has ended, and nothing but blanks follows it."""
        return self._read == self._after and self.rest is None

    def push(self, text: str) -> list[Step]:
        """Returns the steps that have become certain."""
        if self.rest is not None:
            self.rest += text
            return []
        self._held += text
        try:
            while self._read():
                pass
        except _Broken:
            self.rest = self._before_calls + self._held
        return self._taken()

    def finish(self) -> list[Step]:
        """Returns the rest of a value that is cut off; the rest of anything else is then in `rest`."""
        if self.rest is None and self._read == self._value:
            self._add(self._held)
        elif self.rest is None and (not self.n_calls or self._held.strip()):
            self.rest = self._before_calls + self._held
        return self._taken()

    def _taken(self) -> list[Step]:
        steps, self._steps = self._steps, []
        return steps

    def _at_start(self) -> bool:
        return self._tag((self._begin, self._start))

    def _begin(self) -> None:
        self._read = self._between

    def _between(self) -> bool:
        return self._tag((self._begin_call, (f'<{self._mark}invoke name="', '">')), (self._finish_block, self._end))

    def _begin_call(self, name: str) -> None:
        if not name.strip():
            raise _Broken
        self._steps.append(Step(name, ""))
        self.n_calls, self._keys, self._read = self.n_calls + 1, [], self._inside

    def _finish_block(self) -> None:
        if not self.n_calls:
            raise _Broken
        self._read = self._after

    def _inside(self) -> bool:
        parameter = (f'<{self._mark}parameter name="', '" string="', '">')
        return self._tag((self._begin_value, parameter), (self._finish_call, (f"</{self._mark}invoke>",)))

    def _begin_value(self, key: str, kind: str) -> None:
        if key in self._keys or kind not in ("true", "false"):
            raise _Broken
        self._is_string, self._read = kind == "true", self._value
        head = f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: "
        self._steps.append(Step("", head + '"' * self._is_string))
        self._keys.append(key)

    def _finish_call(self) -> None:
        self._steps.append(Step("", "}" if self._keys else "{}"))
        self._read = self._between

    def _value(self) -> bool:
        end = f"</{self._mark}parameter>"
        value, found, rest = self._held.partition(end)
        n_held = 0 if found else overlap(value, end)
        self._held = rest if found else value[len(value) - n_held :]
        self._add(value[: len(value) - n_held])
        if found:
            self._steps.append(Step("", '"' * self._is_string))
            self._read = self._inside
        return bool(found)

    def _add(self, value: str) -> None:
        text = value.replace(self._mark, DSML.text)
        if not text:
            return
        self._steps.append(Step("", json.dumps(text, ensure_ascii=False)[1:-1] if self._is_string else text))

    def _after(self) -> bool:
        if self._held.strip():
            raise _Broken
        return False

    def _tag(self, *choices: tuple[Callable[..., None], tuple[str, ...]]) -> bool:
        """Reads one of several tags, blanks before it included, and does what belongs to it."""
        is_possible = False
        for act, tag in choices:
            try:
                found = _fields(self._held, self._mark, *tag)
            except _Broken:
                continue
            is_possible = True
            if found:
                *fields, rest = found
                act(*fields)
                read = self._held[: len(self._held) - len(rest)]
                self._before_calls = "" if self.n_calls else self._before_calls + read
                self._held = rest
                return True
        if not is_possible:
            raise _Broken
        return False


def _fields(text: str, mark: str, first: str, *ends: str) -> list[str] | None:
    """Returns what a tag that begins with `first` has before each of the `ends`, and what follows the tag.

    None if more text is needed. Raises `_Broken` if the text cannot become this tag.
    """
    text = text.lstrip()
    if not text.startswith(first):
        if first.startswith(text):
            return None
        raise _Broken
    fields, rest = [], text[len(first) :]
    for end in ends:
        field, found, rest = rest.partition(end)
        if mark in field:
            raise _Broken
        if not found:
            return None
        fields.append(field)
    return [*fields, rest]
