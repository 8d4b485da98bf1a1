"""Calls in DSML as they arrive: the same in any pieces, shown while they are written; all else is content."""

import random

import pytest

from deepseek_jax.data.chat import TEMPLATES
from deepseek_jax.serve.reply import Piece, Reply
from tests.serve.test_reply import TOKENS, ids_of, message, run

BLOCK = ["<", "@", "tool_calls>\n<", "@", 'invoke name="f">\n<', "@", 'parameter name="a" string="true">x y</']
BLOCK += [
    "@",
    "parameter>\n<",
    "@",
    'parameter name="b" string="false">[1]</',
    "@",
    "parameter>\n</",
    "@",
    "invoke>\n</",
]
BLOCK += ["@", "tool_calls>"]
CALLED = ("f", '{"a": "x y", "b": [1]}')


def ids(*pieces):
    """Ids of texts; @ is the special token of a tag."""
    return [i for piece in pieces for i in TOKENS.encode(piece.replace("@", "｜DSML｜"), specials=piece == "@")]


def shown(given, **options):
    """(number of ids read so far, piece) of each piece."""
    reply = Reply(TEMPLATES["v4"], TOKENS, **options)
    pieces = [(n, piece) for n, i in enumerate(given) for piece in reply.push([i])]
    return pieces + [(len(given), piece) for piece in reply.finish()]


def test_a_call_shows_its_name_and_its_arguments_as_they_are_written():
    given = ids("So:\n\n", *BLOCK)
    pieces = shown(given)
    assert "".join(piece.text for _, piece in pieces if piece.kind == "content") == "So:"
    calls = [(n, piece) for n, piece in pieces if piece.kind == "call"]
    assert (
        calls[0][1] == Piece("call", "", 0, "f")
        and calls[0][0] == len(ids("So:\n\n", *BLOCK[:4], 'invoke name="f">')) - 1
    )
    assert "".join(piece.text for _, piece in calls) == CALLED[1]
    ends = [n for n, piece in calls if piece.text in ("x", " ", "y")]
    assert len(ends) == 3 and ends[-1] < len(ids("So:\n\n", *BLOCK[:7]))  # before the end of the string
    assert run("v4", given)[0] == message("", "So:", CALLED)


@pytest.mark.parametrize(
    ("pieces", "content"),
    [
        (["a < b, see <", "@", "tool_calls>"], "a < b, see <｜DSML｜tool_calls>"),
        (
            ["\n\n<", "@", "tool_calls>\n<", "@", 'invoke name="f"'],
            '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f"',
        ),
        (["<", "@", "function_calls>", "x"], "<｜DSML｜function_calls>x"),
        (["@", "@", "<", "@", "<", "@"], "｜DSML｜｜DSML｜<｜DSML｜<｜DSML｜"),
        (["tags: <｜DSML｜tool_calls>"], "tags: <｜DSML｜tool_calls>"),  # spelled as text
        (["\n\n<"], "\n\n<"),
    ],
)
def test_what_is_no_block_is_content(pieces, content):
    assert run("v4", ids(*pieces))[0]["content"] == content


def test_a_block_after_a_broken_one_counts():
    broken = ids("See \n\n<", "@", "tool_calls> or so:\n\n", *BLOCK)
    assert run("v4", broken)[0] == message("", "See \n\n<｜DSML｜tool_calls> or so:", CALLED)
    nested = ids("<", "@", "tool_calls>\n", *BLOCK)
    assert run("v4", nested)[0] == message("", "<｜DSML｜tool_calls>\n", CALLED)
    after = ids(*BLOCK, "\nDone. ", *BLOCK, "\n")
    assert run("v4", after)[0] == message("", "\nDone. ", CALLED, CALLED)


def test_a_call_that_is_cut_off_or_broken_is_shown_as_far_as_it_is_certain():
    assert run("v4", ids(*BLOCK[:6], 'parameter name="a" string="true">x </'))[0] == message(
        "", "", ("f", '{"a": "x </')
    )
    broken = ids(*BLOCK[:9], " and so on")
    assert run("v4", broken)[0] == message("", "\n< and so on", ("f", '{"a": "x y"'))
    assert run("v4", ids(*BLOCK[:-3]))[0]["tool_calls"][0]["function"]["arguments"] == '{"a": "x y", "b": [1]'


def test_stop_strings_are_for_content_and_thoughts_hold_no_calls():
    assert run("v4", ids("a\n\n", *BLOCK), stop=["x", "tool"]) == (message("", "a", CALLED), False)
    assert run("v4", ids("ab <", "@", "tool_calls> x stop y <", "@"), stop=["stop"]) == (
        message("", "ab <｜DSML｜tool_calls> x "),
        True,
    )
    thought = ids("Hm <", "@", "tool_calls>") + TOKENS.encode("</think>", specials=True) + ids("\n\n", *BLOCK)
    assert run("v4", thought, thinking=True)[0] == message("Hm <｜DSML｜tool_calls>", "", CALLED)


def test_any_tokens_of_nonsense_give_the_same_message():
    draw, n_called = random.Random(0), 0
    for _ in range(150):
        pieces = list(BLOCK)
        for _ in range(draw.randrange(4)):
            place = draw.randrange(len(pieces))
            pieces[place : place + draw.randrange(3)] = draw.choices(
                [*BLOCK, "\n\n<", "x", "</think>", "é"], k=draw.randrange(3)
            )
        given = ids(*draw.choice((["a\n\n"], ["b "], [])), *pieces, *draw.choice(([], ["z"], BLOCK)))
        options = {"thinking": draw.random() < 0.1, "stop": draw.choice(((), ("z",), ("x y", "\n\n<")))}
        whole = run("v4", given, **options)
        n_called += "tool_calls" in whole[0]
        for _ in range(2):
            assert run("v4", TOKENS.merged(given, draw), (3, 9), **options) == whole
        assert run("v4", given, range(1, len(given)), **options) == whole
    assert 50 < n_called < 150


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_what_the_template_writes_is_read_again(name):
    expected = message("Hm.", "So:\n", ("f", '{"a": "<\\n</", "b": {"c": null}}'), ("g-2", "{}"))
    given = ids_of(TEMPLATES[name].reply(expected, thinking=True))
    assert run(name, given, thinking=True) == (expected, False)
