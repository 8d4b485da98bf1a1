"""Messages in order become turns; out of order they are rejected with their number."""

import json

import pytest

from deepseek_jax.data.messages import (
    Assistant,
    Call,
    Conversation,
    Outputs,
    User,
    as_json,
    as_message,
    read,
    read_answer,
)
from deepseek_jax.errors import UserError


def say(role, content="…", **more):
    return {"role": role, "content": content, **more}


def call(name, arguments="{}", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_a_conversation_by_hand():
    messages = [
        say("system", "a"),
        say("system", "b"),
        say("user", "u"),
        say("assistant", None, tool_calls=[call("f", id="1"), call("g", {"x": "é"}, id="2")], reasoning="hm"),
        say("tool", "of g", tool_call_id="2"),
        say("tool", "of f", tool_call_id="1"),
        say("assistant", "done", reasoning_content="so", refusal=None, tool_calls=None),
    ]
    assert read(messages) == Conversation(
        "a\n\nb",
        [
            User("u"),
            Assistant("", "hm", (Call("f", "{}"), Call("g", '{"x": "é"}'))),
            Outputs(("of f", "of g")),
            Assistant("done", "so", ()),
        ],
    )


def test_outputs_without_ids_answer_in_order():
    messages = [say("user"), say("assistant", tool_calls=[call("f"), call("g")]), say("tool", "1"), say("tool", "2")]
    assert read(messages).turns[-1] == Outputs(("1", "2"))


@pytest.mark.parametrize("arguments", [None, {}, "{}"])
def test_a_call_without_arguments(arguments):
    assert read_answer(say("assistant", tool_calls=[call("f", arguments)])).calls == (Call("f", "{}"),)
    missing = {"type": "function", "function": {"name": "f"}}
    assert read_answer(say("assistant", tool_calls=[missing])).calls == (Call("f", "{}"),)


JSON_VALUES = [
    {"城市": "北京", "a": [1, 2.5, None, True]},
    "</tag> & 'quote' \"\n\u2028 🐋",
    {"b": {"z": 1, "a": {}}},
    0,
    [],
]


@pytest.mark.parametrize("value", JSON_VALUES)
@pytest.mark.parametrize("indent", [None, 4])
def test_json_as_the_published_templates_write_it(value, indent):
    text = as_json(value, "it", indent=indent)
    assert json.loads(text) == value
    assert text == json.dumps(value, ensure_ascii=False, indent=indent)  # transformers' tojson
    assert "\\u" not in text


def test_several_system_prompts_are_one():
    messages = [say("system", "a"), say("system", "b"), say("user")]
    assert read(messages).system == "a\n\nb"
    assert read(messages, join_system="".join).system == "ab"


def test_an_answer_as_a_message_and_back():
    message = as_message("a", "t", [Call("f", "{}"), Call("g", "[]")])
    assert read_answer(message) == Assistant("a", "t", (Call("f", "{}"), Call("g", "[]")))
    assert [c["id"] for c in message["tool_calls"]] == ["call_0", "call_1"]
    assert as_message("a") == {"role": "assistant", "content": "a"}


CALLS = say("assistant", tool_calls=[call("f", id="1"), call("g", id="2")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the messages end after the start. Add a message of system or user"),
        ([say("system")], "the messages end after system. Add a message of system or user"),
        ("hello", r"messages\[0\] has role 'h'"),
        ([say("function")], r"messages\[0\] has role 'function'. Expected a dict whose role is one of system, user"),
        ([say("assistant")], r"messages\[0\] has role 'assistant' after the start. Expected system or user"),
        ([say("user"), say("user")], r"messages\[1\] has role 'user' after user. Expected assistant"),
        ([say("user"), say("system")], r"messages\[1\] has role 'system' after user"),
        ([say("user"), say("assistant"), say("tool")], "'tool' after assistant. Expected user"),
        ([say("user"), CALLS, say("user")], "'user' after assistant with tool_calls. Expected tool"),
        ([say("user"), CALLS, say("tool"), say("assistant")], "after tool with other calls unanswered. Expected tool"),
        ([say("user"), CALLS, say("tool")], "the messages end after tool with other calls unanswered"),
        ([say("user"), CALLS, say("tool", tool_call_id="3")], "tool_call_id '3'. Calls without an answer: '1', '2'"),
        ([say("user"), CALLS, say("tool", tool_call_id="2"), say("tool", tool_call_id="2")], "an answer: '1'"),
        ([say("user", None)], r"messages\[0\] has NoneType as content. Expected text"),
        ([say("user", [{"type": "text"}])], r"messages\[0\] has list as content"),
        ([say("user"), say("assistant", None)], r"messages\[1\] has NoneType as content"),
        ([say("user"), say("assistant", reasoning=5)], "has int as reasoning"),
        ([say("user"), say("assistant", tool_calls=[call("f", id="1")] * 2)], r"messages\[1\] has two .* the id '1'"),
        ([say("user"), say("assistant", tool_calls=5)], "has tool_calls of .* Expected a list"),
        ([say("user"), say("assistant", tool_calls=["f"])], r"messages\[1\], tool_calls\[0\] is 'f'"),
        ([say("user"), say("assistant", tool_calls=[call("")])], r"tool_calls\[0\] is "),
        ([say("user"), say("assistant", tool_calls=[call(5)])], "has int as name"),
        ([say("user"), say("assistant", tool_calls=[call("f", {1})])], r"tool_calls\[0\] cannot be written as JSON"),
    ],
)
def test_what_is_out_of_order(messages, message):
    with pytest.raises(UserError, match=message):
        read(messages)
