"""Whatever is drawn from the allowed tokens has the form that was asked for."""

import json
import random

import numpy as np
import pytest

from deepseek_jax.data.chat import TEMPLATES, spell
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.grammar import Constrained, Grammars, json_schema, tool_calls
from deepseek_jax.serve.reply import Reply

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "<｜User｜>"]}, "days": {"type": "array", "items": {"enum": [1, 20]}}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
PLACE["properties"]["days"]["maxItems"] = 3
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PLACE}} for name in ("weather", "train_to")]


@pytest.fixture(scope="module")
def grammars():
    tokenizer = open_tokenizer("deepseek")
    return Grammars(tokenizer, (tokenizer.eos_id,))


def ids_of(words):
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def drawn(constrained, end_id, draw, first=()):
    """The tokens `first`, then allowed ones until the answer ends."""
    found = []
    while found[-1:] != [end_id]:
        words = constrained.allowed()
        token = first[len(found)] if len(found) < len(first) else int(draw.choice(ids_of(words)))
        constrained.push(token)
        found.append(token)
        assert len(found) < 400
    return found


@pytest.mark.parametrize("name", ["v3", "r1", "v31", "v32", "v4"])
def test_a_forced_call_is_a_call(grammars, name):
    template, tokenizer = TEMPLATES[name], grammars.tokenizer
    matcher = grammars.compile(tool_calls(template, tokenizer, TOOLS))
    names = set()
    for seed in range(6):
        constrained = Constrained(grammars, matcher.deep_copy())
        reply = Reply(template, tokenizer)
        reply.push(drawn(constrained, tokenizer.eos_id, random.Random(seed)))
        message = reply.message()
        (call,) = message["tool_calls"]
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["city"] in ("Köln", "<｜User｜>") and set(arguments["days"]) <= {1, 20}
        assert message["content"] == ""
    assert names == {"weather", "train_to"}
    only = grammars.compile(tool_calls(template, tokenizer, TOOLS, "train_to"))
    reply = Reply(template, tokenizer)
    reply.push(drawn(Constrained(grammars, only), tokenizer.eos_id, random.Random(0)))
    assert reply.message()["tool_calls"][0]["function"]["name"] == "train_to"


def parameters(**properties):
    found = {"type": "object", "properties": properties, "required": list(properties)[:2]}
    return [
        {"type": "function", "function": {"name": "f", "parameters": found | {"$defs": {"n": {"enum": [7, None]}}}}}
    ]


def test_parameters_follow_their_schemas(grammars):
    """Strings as they are, bounded ones and all else as JSON; what is not required may be missing."""
    template, tokenizer = TEMPLATES["v4"], grammars.tokenizer
    short = {"type": "string", "maxLength": 2, "minLength": 2}
    form = parameters(text={"type": "string", "title": "t"}, n={"$ref": "#/$defs/n"}, kind={"const": "a"}, short=short)
    matcher = grammars.compile(tool_calls(template, tokenizer, form))
    begun = spell(template.reply(CALL_OF_F)).partition("</｜DSML｜parameter>")[0]
    first = tokenizer.encode(begun + "</｜DSML｜parameter>", specials=True).tolist()
    found = set()
    for seed in range(8):
        reply = Reply(template, tokenizer)
        reply.push(drawn(Constrained(grammars, matcher.deep_copy()), tokenizer.eos_id, random.Random(seed), first))
        (call,) = reply.message()["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments.pop("text") == 'a </b>\n"c"' and arguments.pop("n") in (7, None)
        assert len(arguments.get("short", "ab")) == 2 and arguments.get("kind", "a") == "a"
        found.add(tuple(sorted(arguments)))
    assert len(found) > 1
    maybe = parameters(x={"anyOf": [{"type": "string"}, {"type": "null"}]}, y={"type": ["string", "null"]})
    text = tool_calls(template, tokenizer, maybe)
    assert text.count("/(?s:.*)<") == 2 and text.count("%json") == 2


def test_parameters_are_in_the_order_of_their_schema(grammars):
    form = {"properties": {"b": {}, "a": {}}, "required": ["c", "a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": form}}]
    text = tool_calls(TEMPLATES["v4"], grammars.tokenizer, tools)
    assert text.index('name=\\"b\\"') < text.index('name=\\"a\\"') < text.index('name=\\"c\\"')


@pytest.mark.parametrize("wrong", [5, True, None, {}, "substring", ["string", 5]])
def test_a_type_that_is_none_is_refused_in_words(grammars, wrong):
    for tools in (parameters(x={"type": wrong}), parameters(x={"anyOf": [{"type": wrong}]})):
        for name in ("v31", "v4"):
            with pytest.raises(UserError, match="the schema cannot be followed"):
                grammars.compile(tool_calls(TEMPLATES[name], grammars.tokenizer, tools))


def test_tools_whose_grammar_is_long_together_are_refused_early(grammars):
    """The definitions of each are written with each of its values."""
    form = {"$defs": {"a": {"const": "b" * 10_000}}, "properties": {f"k{n}": {} for n in range(40)}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": form}} for n in range(50)]
    with pytest.raises(UserError, match="the grammar of [4-6] of 50 tools .*expected at most 2000000 for all of them"):
        tool_calls(TEMPLATES["v4"], grammars.tokenizer, tools)


CALL_OF_F = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"text": 'a </b>\n"c"'})}}
CALL_OF_F = {"role": "assistant", "content": None, "tool_calls": [CALL_OF_F]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"anyOf": [{"type": "object"}]}, "have anyOf: expected properties and required alone"),
        ({"type": "string"}, "a type that is not object"),
        ({"properties": []} | {"required": [[]]}, "expected properties as an object and required as names"),
        ({"properties": {"x": True}}, "a schema is True: expected an object"),
        (
            {"$defs": {"a": "b" * 100_000}, "properties": {f"k{n}": {} for n in range(150)}},
            "definitions that are too long",
        ),
    ],
)
def test_parameters_that_are_not_written_one_by_one_are_refused(grammars, schema, message):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(UserError, match=message):
        tool_calls(TEMPLATES["v4"], grammars.tokenizer, tools)


def test_a_thought_is_free_and_the_form_follows(grammars):
    tokenizer = grammars.tokenizer
    thought = tokenizer.encode("Hm. {</think>", specials=True).tolist()
    think = tokenizer.encode("<think>", specials=True).tolist()
    matcher = grammars.compile(json_schema(PLACE))
    opened = Constrained(grammars, matcher.deep_copy(), in_thought=True)
    assert opened.allowed() is None
    text = drawn(opened, tokenizer.eos_id, random.Random(1), thought)[len(thought) :]
    assert set(json.loads(tokenizer.decode(text))) == {"city", "days"}
    may_think = Constrained(grammars, matcher.deep_copy(), may_think=True)
    assert think[0] in ids_of(may_think.allowed())
    text = drawn(may_think, tokenizer.eos_id, random.Random(2), think + thought)[len(think + thought) :]
    assert set(json.loads(tokenizer.decode(text))) == {"city", "days"}
    assert think[0] not in ids_of(Constrained(grammars, matcher).allowed())


def test_a_wrong_token_ends_the_answer_and_special_tokens_are_no_text(grammars):
    tokenizer = grammars.tokenizer
    constrained = Constrained(grammars, grammars.compile(json_schema({"type": "string"})))
    constrained.push(int(tokenizer.encode('"')[0]))
    inside = ids_of(constrained.allowed())
    marks = ("<think>", "</think>", "<｜User｜>", "<｜tool▁calls▁begin｜>", "<｜end▁of▁sentence｜>")
    assert not {int(tokenizer.encode(mark, specials=True)[0]) for mark in marks} & set(inside.tolist())
    constrained.push(tokenizer.eos_id)
    assert ids_of(constrained.allowed()).tolist() == [tokenizer.eos_id] and constrained.has_failed
    whole = Constrained(grammars, grammars.compile(json_schema(PLACE)))
    drawn(whole, tokenizer.eos_id, random.Random(3))
    assert not whole.has_failed


def test_requests_share_no_state(grammars):
    matcher = grammars.compile(json_schema(PLACE))
    one, other = (Constrained(grammars, matcher.deep_copy()) for _ in range(2))
    before = one.allowed().copy()
    other.push(int(ids_of(other.allowed())[0]))
    assert not np.array_equal(other.allowed(), before) and np.array_equal(one.allowed(), before)


def test_what_no_grammar_expresses_is_refused(grammars):
    with pytest.raises(UserError, match="expected one of \\['weather', 'train_to'\\]"):
        tool_calls(TEMPLATES["v3"], grammars.tokenizer, TOOLS, "boat")
    with pytest.raises(UserError, match="a model whose format has calls"):
        tool_calls(TEMPLATES["v2"], grammars.tokenizer, TOOLS)
    with pytest.raises(UserError, match="cannot be followed: Invalid type"):
        grammars.compile(json_schema({"type": "nonsense"}))
    for wrong in ({"type": "nonsense"}, {"type": "string", "pattern": "((a"}):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": wrong}}}}
        with pytest.raises(UserError, match="the schema cannot be followed"):
            grammars.compile(tool_calls(TEMPLATES["v3"], grammars.tokenizer, [tool]))
