"""However ids arrive, a reply is the same message, and of a well-formed answer the one that the template parses."""

import itertools
import random

import pytest

from deepseek_jax.data.chat import TEMPLATES, marks, spell
from deepseek_jax.data.messages import Call
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.serve.reply import Piece, Reply

MARKS = [mark.text for mark in (marks.THINK, marks.END_THINK, marks.EOS, marks.EOT)]
MARKS += [mark.text for mark in (marks.CALLS, marks.END_CALLS, marks.CALL, marks.END_CALL, marks.SEP, marks.DSML)]


class Tokens(ByteTokenizer):
    """Bytes, every special token of an answer as one id, and ids for several bytes as they are needed."""

    def __init__(self):
        super().__init__()
        self.pieces = [bytes([i]) for i in range(256)] + [mark.encode() for mark in MARKS]

    def encode(self, text, specials=False):
        for mark in MARKS if specials else ():
            before, found, after = text.partition(mark)
            if found:
                return [*self.encode(before, specials), 256 + MARKS.index(mark), *self.encode(after, specials)]
        return list(text.encode())

    def decode(self, ids, specials=False):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def merged(self, ids, draw):
        """The same text in other tokens, which end anywhere, in the middle of a character too."""
        found = []
        while ids:
            n = draw.randrange(1, 12)
            piece = next((ids[:k] for k in range(min(n, len(ids)), 1, -1) if max(ids[:k]) < 256), ids[:1])
            ids = ids[len(piece) :]
            if len(piece) > 1:
                self.pieces.append(bytes(piece))
                piece = [len(self.pieces) - 1]
            found += piece
        return found


TOKENS = Tokens()


def ids_of(parts):
    return [i for part in parts for i in TOKENS.encode(part.text, specials=part.is_mark)]


def joined(pieces):
    """Texts by kind, calls by number."""
    texts, calls = {"thought": "", "content": ""}, []
    for piece in pieces:
        if piece.kind == "call":
            if piece.name:
                assert piece.number == len(calls)
                calls.append(Call(piece.name, ""))
            calls[piece.number] = calls[piece.number]._replace(arguments=calls[piece.number].arguments + piece.text)
        else:
            texts[piece.kind] += piece.text
    return texts["thought"], texts["content"], calls


def run(name, ids, cuts=(), thinking=False, stop=()):
    reply = Reply(TEMPLATES[name], TOKENS, thinking, stop)
    cuts = [0, *cuts, len(ids)]
    pieces = [piece for a, b in itertools.pairwise(cuts) for piece in reply.push(ids[a:b])]
    pieces += reply.finish()
    assert all(piece.text or piece.name for piece in pieces)
    message = reply.message()
    assert joined(pieces) == (
        message.get("reasoning_content", ""),
        message["content"],
        [Call(**call["function"]) for call in message.get("tool_calls", ())],
    )
    return message, reply.has_stopped


def message(thought="", content="", *calls):
    found = {"role": "assistant", "content": content}
    if thought:
        found["reasoning_content"] = thought
    if calls:
        found["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ]
    return found


WORDS = [
    "Hm",
    " ",
    "\n",
    "é",
    "🐋",
    "深度",
    "<think>",
    "</think>",
    "<｜tool▁call▁end｜>",
    "```",
    "a",
    "1",
    '{"x": [1]}',
    "\n\n<",
    "</",
    "<｜DSML｜tool_calls>",
]
ARGUMENTS = [
    "{}",
    "1",
    "null",
    "true",
    '{"city": "Rome", "days": [1, {"a": "\\n```"}]}',
    '{"text": "' + "long " * 20 + '"}',
]


def some_message(name, draw):
    template = TEMPLATES[name]
    text = lambda: "".join(draw.choice(WORDS) for _ in range(draw.randrange(8)))  # noqa: E731
    thought = "x" + text() + "y" if template.thinks and draw.random() < 0.6 else ""
    calls = []
    if template.has_calls and draw.random() < 0.6:
        forms = [one for one in ARGUMENTS if one.startswith("{") or template.call_format]  # the others are reworded
        calls = [(draw.choice(("weather", "f-2")), draw.choice(forms)) for _ in range(draw.randrange(1, 4))]
    content = text()
    content = content if thought or not template.thinks else "z" + content
    return message(thought, content.rstrip("\n") if name == "coder" else content, *calls)


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_tokens_give_the_message_that_was_written(name):
    draw = random.Random(name)
    for _ in range(60):
        expected = some_message(name, draw)
        thinking = (name in ("v31", "v32") and "reasoning_content" in expected) or TEMPLATES[name].opens_thought
        if thinking and "reasoning_content" not in expected:
            expected["reasoning_content"] = "Hm"
        parts = TEMPLATES[name].reply(expected, thinking)
        ids = ids_of(parts)
        assert run(name, ids, thinking=thinking) == (expected, False)
        if not any(mark.strip("<>") in expected["content"] for mark in MARKS):
            thought = expected.get("reasoning_content", "")
            if not any(mark in thought for mark in MARKS):
                assert TEMPLATES[name].parse(spell(parts), thinking) == expected
        assert run(name, ids, range(1, len(ids)), thinking)[0] == expected
        for _ in range(3):
            assert run(name, TOKENS.merged(ids, draw), thinking=thinking)[0] == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_tokens_of_nonsense_give_the_same_message(name):
    draw = random.Random(name)
    n_stopped = 0
    for _ in range(250):
        letters = [*range(256, 256 + len(MARKS)), *b"ab\n` f\xf0\x9f\x90\x8b" * 4]
        ids = [draw.choice(letters) for _ in range(40)]
        ids += TOKENS.encode("function<｜tool▁sep｜>f\n```json\n{}\n", specials=True)
        draw.shuffle(ids)
        options = {"thinking": draw.random() < 0.3, "stop": draw.choice(((), ("ab", "b\n"), ("aaa", "a f", "")))}
        whole = run(name, ids, **options)
        n_stopped += whole[1]
        for _ in range(3):
            assert run(name, TOKENS.merged(ids, draw), (3, 9), **options) == whole
        assert run(name, ids, range(1, len(ids)), **options) == whole
    assert n_stopped > 5


def test_a_thought_that_does_not_end_is_all_thought():
    for name, text, thinking in (("r1", "<think>\nHm", False), ("r1", "Hm", True), ("v31", "Hm", True)):
        ids = TOKENS.encode(text, specials=True)
        assert run(name, ids, thinking=thinking)[0] == message("Hm")


def test_the_end_of_a_thought_and_the_first_word_may_come_together():
    reply = Reply(TEMPLATES["r1"], TOKENS, thinking=True)
    assert reply.push(TOKENS.encode("Hm")) == [Piece("thought", "H"), Piece("thought", "m")]
    assert reply.push(TOKENS.encode("\n</think>\n\nHi", specials=True)) == [
        Piece("content", "H"),
        Piece("content", "i"),
    ]


def test_a_call_shows_its_name_and_its_arguments_as_they_are_written():
    ids = ids_of(TEMPLATES["v3"].reply(message("", "", ("weather", '{"city": "Rome"}'))))
    reply = Reply(TEMPLATES["v3"], TOKENS)
    shown = [(n, piece) for n, i in enumerate(ids) for piece in reply.push([i])]
    name_at, arguments_at = shown[0][0], shown[-1][0]
    assert shown[0][1] == Piece("call", "", 0, "weather")
    assert "".join(piece.text for _, piece in shown) == '{"city": "Rome"}'
    assert arguments_at - name_at > 10  # not all at once
    assert reply.finish() == []


def test_a_call_without_its_end_is_shown_as_far_as_it_is_certain():
    ids = ids_of(TEMPLATES["v31"].reply(message("", "So:", ("weather", '{"city": "Rome"}'))))
    assert run("v31", ids[:-6])[0] == message("", "So:", ("weather", '{"city": "Rom'))
    ids = TOKENS.encode("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weath", specials=True)
    assert run("v31", ids)[0]["content"] == "<｜tool▁call▁begin｜>weath"


@pytest.mark.parametrize("stop", ["</s>", "\n\nUser", "é"])
def test_no_part_of_a_stop_string_is_shown(stop):
    ids = TOKENS.encode(f"Hello{stop[:-1]} and {stop}more")
    reply = Reply(TEMPLATES["v3"], TOKENS, stop=[stop])
    texts = ["".join(piece.text for piece in reply.push([i])) for i in ids]
    assert "".join(texts) == f"Hello{stop[:-1]} and " and reply.has_stopped
    assert reply.finish() == [] and texts[-3:] == ["", "", ""]
    reply = Reply(TEMPLATES["v3"], TOKENS, stop=[stop])
    text = f"Hello{stop[:-1]}"
    assert "".join(piece.text for piece in reply.push(TOKENS.encode(text)) + reply.finish()) == text


def test_stop_strings_are_for_content():
    ids = TOKENS.encode("a stop b</think>\n\nc stop d", specials=True)
    assert run("r1", ids, thinking=True, stop=["stop"]) == (message("a stop b", "c "), True)
    ids = TOKENS.encode("a </s b</think>\n\nc </s> d", specials=True)  # it begins as the end of a thought does
    for cuts in ((), range(1, len(ids))):
        assert run("r1", ids, cuts, thinking=True, stop=["</s>"]) == (message("a </s b", "c "), True)
    calls = ids_of(TEMPLATES["v31"].reply(message("", "x", ("f", '"stop"'))))
    assert run("v31", calls, stop=["stop"]) == (message("", "x", ("f", '"stop"')), False)


def test_of_several_stop_strings_the_first_to_be_complete_ends_the_text():
    ids = TOKENS.encode("xabcdy")
    for cuts in ((), range(1, 6), (3,)):
        assert run("v3", ids, cuts, stop=["abcd", "bc"])[0]["content"] == "xa"
        assert run("v3", ids, cuts, stop=["bc", "abc"])[0]["content"] == "x"


def test_half_a_character_at_the_end_is_shown_as_such():
    assert run("v3", list("a🐋".encode())[:-1])[0]["content"] == "a�"


def test_text_that_spells_a_special_token_is_text():
    assert run("r1", TOKENS.encode("a</think>b<｜tool▁calls▁begin｜>"), thinking=True)[0] == message(
        "a</think>b<｜tool▁calls▁begin｜>"
    )


def test_nothing_after_the_end_mark_counts():
    assert run("v3", [*b"Hi", TOKENS.encode(marks.EOS.text, specials=True)[0], *b"you"])[0] == message("", "Hi")
