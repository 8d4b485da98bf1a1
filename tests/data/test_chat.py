"""Prompts exactly as published; parse inverts a reply; text typed by users never contains special tokens."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data.chat import (
    TEMPLATES,
    Part,
    fim_parts,
    jinja,
    join,
    marks,
    recognise,
    spell,
    template,
    template_for,
    to_ids,
)
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("published_chats", Path(__file__).with_name("published_chats.py"))
published_chats = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published_chats)

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi!"}
SUM = {"role": "user", "content": "1+1=?"}
WEATHER = {"role": "user", "content": "Weather in Rome and Oslo?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(city, n=0):
    return {
        "id": f"call_{n}",
        "type": "function",
        "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'},
    }


def output(text, n=0):
    return {"role": "tool", "tool_call_id": f"call_{n}", "content": text}


CALLS = {"role": "assistant", "content": "", "tool_calls": [call("Rome"), call("Oslo", 1)]}
OUTPUTS = [output("sun"), output("snow", 1)]
ANSWER = {"role": "assistant", "content": "Sun and snow."}

PROMPTS = [
    ("v1", [HELLO], "<｜begin▁of▁sentence｜>User: Hello\n\nAssistant:"),
    ("v1", [SYSTEM, HELLO], "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hello\n\nAssistant:"),
    (
        "v2",
        [SYSTEM, HELLO, HI, SUM],
        "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hello\n\nAssistant: Hi!<｜end▁of▁sentence｜>"
        "User: 1+1=?\n\nAssistant:",
    ),
    (
        "coder",
        [HELLO, HI, SUM],
        "<｜begin▁of▁sentence｜>You are an AI programming assistant, utilizing the Deepseek Coder model, developed by "
        "Deepseek Company, and you only answer questions related to computer science. For politically sensitive "
        "questions, security and privacy issues, and other non-computer science questions, you will refuse to answer\n"
        "### Instruction:\nHello\n### Response:\nHi!\n<|EOT|>\n### Instruction:\n1+1=?\n### Response:\n",
    ),
    (
        "coder",
        [SYSTEM, HELLO, HI],
        "<｜begin▁of▁sentence｜>Be brief.### Instruction:\nHello\n### Response:\nHi!\n<|EOT|>\n",
    ),
    (
        "v3",
        [SYSTEM, HELLO, HI, SUM],
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜>Hi!<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜>",
    ),
    (
        "r1",
        [HELLO, {"role": "assistant", "content": "<think>\nHmm\n</think>\n\nHi!"}, SUM],
        "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>\n\nHi!<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜>",
    ),
    (
        "r1",
        [HELLO, {"role": "assistant", "content": "Hi!", "reasoning_content": "Hmm"}, SUM],
        "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>Hi!<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜>",
    ),
    (
        "v31",
        [SYSTEM, HELLO, {"role": "assistant", "content": "<think>Hmm</think>Hi!"}, SUM],
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜></think>Hi!<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜></think>",
    ),
    (
        "v3",
        [WEATHER, CALLS, *OUTPUTS],
        "<｜begin▁of▁sentence｜><｜User｜>Weather in Rome and Oslo?<｜Assistant｜><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>snow<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
    (
        "v31",
        [WEATHER, CALLS, *OUTPUTS, ANSWER, SUM],
        "<｜begin▁of▁sentence｜><｜User｜>Weather in Rome and Oslo?<｜Assistant｜></think><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>snow<｜tool▁output▁end｜>Sun and snow.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜></think>",
    ),
]


@pytest.mark.parametrize(("name", "messages", "prompt"), PROMPTS)
def test_prompts_to_the_letter(name, messages, prompt):
    assert TEMPLATES[name].encode(messages) == prompt


def test_a_thought_opened_by_the_prompt():
    assert TEMPLATES["r1"].encode([HELLO], thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>\n"
    )
    assert TEMPLATES["v31"].encode([HELLO, HI, SUM], thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜></think>Hi!<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )


def test_a_second_round_of_calls_is_written_as_the_first():
    for name in ("v3", "r1"):
        text = TEMPLATES[name].encode([WEATHER, CALLS, *OUTPUTS, CALLS, *OUTPUTS, ANSWER])
        assert text.count("<｜tool▁calls▁begin｜>") == text.count("<｜tool▁outputs▁end｜>") == 2
        assert "<｜tool▁outputs▁end｜><｜tool▁calls▁begin｜>" in text
        assert text.endswith("<｜tool▁outputs▁end｜>Sun and snow.<｜end▁of▁sentence｜>")


def test_tools_in_the_system_prompt():
    v3 = """<｜begin▁of▁sentence｜>Be brief.

## Tools

### Function

You have the following functions available:

- `weather`:
```json
{
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {
                "type": "string"
            }
        }
    }
}
```<｜User｜>Hello<｜Assistant｜>"""
    assert TEMPLATES["v3"].encode([SYSTEM, HELLO], TOOLS) == TEMPLATES["r1"].encode([SYSTEM, HELLO], TOOLS) == v3
    assert TEMPLATES["v3"].encode([HELLO], TOOLS) == v3.replace("Be brief.", "You are a helpful Assistant.")
    v31 = """<｜begin▁of▁sentence｜>Be brief.

## Tools
You have access to the following tools:

### weather
Description: Weather of a city

Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
{additional_tool_calls}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces<｜User｜>Hello<｜Assistant｜></think>"""
    assert TEMPLATES["v31"].encode([SYSTEM, HELLO], TOOLS) == v31


def test_fill_in_the_middle():
    text = "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f(x):\n<｜fim▁hole｜>\nf(1)<｜fim▁end｜>"
    assert spell(fim_parts("def f(x):\n", "\nf(1)")) == text
    ids = to_ids(fim_parts("a", "b"), open_tokenizer("bytes"))
    assert ids.tolist() == [256, 259, ord("a"), 260, ord("b"), 261]


# What a model writes.


def test_parse_by_hand():
    parsed = TEMPLATES["r1"].parse("<think>\nHmm\n</think>\n\nHi!<｜end▁of▁sentence｜>")
    assert parsed == {"role": "assistant", "content": "Hi!", "reasoning_content": "Hmm"}
    assert TEMPLATES["r1"].parse("\n<think>\nHmm\n</think>\n\nHi!") == parsed
    assert TEMPLATES["r1"].parse("Hmm\n</think>\n\nHi!", thinking=True) == parsed
    assert TEMPLATES["r1"].parse("Hmm\n</think>\n\nHi!") == parsed  # the caller forgot
    assert TEMPLATES["v31"].parse("Hmm</think>Hi!<｜end▁of▁sentence｜>", thinking=True) == parsed
    assert TEMPLATES["v31"].parse("Hmm</think>Hi!")["content"] == "Hmm</think>Hi!"  # without thinking, just an answer
    for name, text in (("v1", " Hi!<｜end▁of▁sentence｜>"), ("v2", " Hi!"), ("coder", "Hi!\n<|EOT|>\n"), ("v3", "Hi!")):
        assert TEMPLATES[name].parse(text) == HI
    calls = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    assert TEMPLATES["v31"].parse("So:" + calls) == {
        "role": "assistant",
        "content": "So:",
        "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": "{"}}],
    }


def test_a_thought_without_an_end_is_all_thought():
    for name, text, thinking in (("r1", "<think>\nHm", False), ("r1", "Hm", True), ("v31", "Hm", True)):
        assert TEMPLATES[name].parse(text, thinking) == {"role": "assistant", "content": "", "reasoning_content": "Hm"}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name].call_format])
def test_calls_are_taken_whole_or_not_at_all(name):
    whole = spell(TEMPLATES[name].reply(CALLS)).removesuffix(marks.EOS.text)
    assert TEMPLATES[name].parse(whole) == CALLS
    for length in range(len(whole)):
        assert TEMPLATES[name].parse(whole[:length]) == {"role": "assistant", "content": whole[:length]}
    for odd in (
        whole.replace(marks.SEP.text, "", 1),
        whole.replace("weather", "", 1),
        whole.replace(marks.END_CALL.text, "", 1),
        whole.replace(marks.CALL.text, "and", 1),
        whole + "and more",
        marks.CALLS.text + marks.END_CALLS.text,
    ):
        assert TEMPLATES[name].parse(odd) == {"role": "assistant", "content": odd}


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_the_published_template_writes_it(name):
    ours = []
    for messages in published_chats.conversations(name):
        thinking = TEMPLATES[name].opens_thought and messages[-1]["role"] == "user"
        ours.append(TEMPLATES[name].encode(messages, thinking=thinking))
    assert published_chats.digest(ours) == published_chats.DIGESTS[name]


@pytest.mark.parametrize("name", jinja.TEXTS)
def test_our_jinja_templates_write_the_published_prompts(name):
    """What is written beside a tuned model is recognised as its template, and renders as the published one does."""
    pytest.importorskip("jinja2")
    text = jinja.TEXTS[name]
    assert jinja.TEXTS[recognise(text)] == text
    texts = [published_chats.render(text, messages) for messages in published_chats.conversations(name)]
    assert published_chats.digest(texts) == published_chats.DIGESTS[name]


@pytest.mark.parametrize("name", ["v2.5", "v3", "r1", "v31"])
def test_our_jinja_templates_write_tools(name):
    pytest.importorskip("jinja2")
    for messages in ([SYSTEM, HELLO], [HELLO, HI, HELLO]):
        found = published_chats.render(jinja.TEXTS[name], messages, tools=TOOLS)
        assert found == TEMPLATES[name].encode(messages, TOOLS)


@pytest.mark.parametrize("name", ["r1-0120", "r1", "v31"])
def test_our_jinja_templates_open_thoughts(name):
    pytest.importorskip("jinja2")
    for thinking in (False, True):
        found = published_chats.render(jinja.TEXTS[name], [HELLO], thinking=thinking)
        assert found == TEMPLATES[name].encode([HELLO], thinking=thinking)


def test_the_first_templates_open_a_block_once():
    calls, end = (
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>",
        "<｜end▁of▁sentence｜>",
    )
    one = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
    sun = {"role": "tool", "content": "sun"}
    output = "<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>"
    talk = [WEATHER, one, sun, one, sun, ANSWER]
    text = "<｜begin▁of▁sentence｜><｜User｜>Weather in Rome and Oslo?<｜Assistant｜><｜tool▁calls▁begin｜>" + calls
    last = f"<｜tool▁outputs▁end｜>Sun and snow.{end}"
    close = f"<｜tool▁calls▁end｜>{end}"
    assert TEMPLATES["v3-1226"].encode(talk) == (
        f"{text}<｜tool▁outputs▁begin｜>{output}\n{calls}{close}\n{output}{last}"  # the first block is left open
    )
    assert (
        TEMPLATES["r1-0120"].encode(talk)
        == f"{text}{close}<｜tool▁outputs▁begin｜>{output}\n{calls}{close}{output}{last}"
    )
    assert TEMPLATES["v2.5"].encode([SYSTEM, HELLO]) == " " * 8 + TEMPLATES["v3"].encode([SYSTEM, HELLO])


def test_v31_keeps_a_thought_that_follows_outputs():
    thoughtful = {"role": "assistant", "content": "<think>Hm</think>Sun and snow."}
    text = TEMPLATES["v31"].encode([WEATHER, CALLS, *OUTPUTS, thoughtful, SUM, thoughtful, SUM])
    assert text.count("<think>Hm</think>Sun and snow.") == 1
    assert text.count("</think>Sun and snow.") == 2


FRAGMENTS = [value.text for value in vars(marks).values() if isinstance(value, Part)] + [
    *(
        "",
        " ",
        "\n",
        "\n\n",
        "a",
        "深度",
        "🐋",
        "\ud800",
        "function",
        "function<｜tool▁sep｜>f\n```json\n",
        "\n```",
        "{}",
    ),
    *("### Response:\n", "User: ", "\n\nAssistant:", "<think", "｜>", "\n\n<", "</", "invoke>", "parameter>"),
    *("<｜DSML｜tool_calls>", "<｜DSML｜function_calls>", '<｜DSML｜invoke name="f">', "</｜DSML｜tool_calls>"),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_parse_never_raises(name):
    lottery = random.Random(name)
    for _ in range(3000):
        text = "".join(lottery.choices(FRAGMENTS, k=lottery.randrange(12)))
        for thinking in (False, True):
            message = TEMPLATES[name].parse(text, thinking)
            assert isinstance(message["content"], str)
            assert set(message) <= {"role", "content", "reasoning_content", "tool_calls"}


def messages_to_say(name):
    thought = {"role": "assistant", "content": "Two.", "reasoning_content": "\nOne and one\n\nis two."}
    with_calls = {**CALLS, "content": "Let me see.\n"}
    thoughts = [thought, {**with_calls, **thought}] if TEMPLATES[name].thinks else []
    has_tools = name not in ("v1", "v2", "coder")
    return [HI, {**HI, "content": " \n Hi! \n"}, *([CALLS, with_calls] if has_tools else []), *thoughts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_parse_inverts_reply(name):
    for message in messages_to_say(name):
        for thinking in (False, True):
            if name in ("v31", "v32", "v4") and not thinking and "reasoning_content" in message:
                message = {key: value for key, value in message.items() if key != "reasoning_content"}
            text = spell(TEMPLATES[name].reply(message, thinking))
            assert TEMPLATES[name].parse(text, thinking) == message
            assert text.endswith(TEMPLATES[name].end.text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_and_its_reply_are_a_conversation(name):
    encode, reply = TEMPLATES[name].encode, TEMPLATES[name].reply
    whole = encode([HELLO, HI, SUM, ANSWER]).removesuffix("\n")
    assert encode([HELLO, HI, SUM]) + spell(reply(ANSWER)) == whole


# Invalid requests.


@pytest.mark.parametrize(
    ("name", "messages", "options", "message"),
    [
        ("v1", [WEATHER, CALLS], {}, "'v1' has no tool calls"),
        ("v2", [HELLO], {"tools": TOOLS}, "'v2' has no tools"),
        ("coder", [HELLO], {"thinking": True}, "'coder' has no thinking"),
        ("v3", [HELLO], {"thinking": True}, "'v3' has no thinking"),
        ("v2.5", [HELLO], {"thinking": True}, "'v2.5' has no thinking"),
        ("v3-1226", [HELLO], {"thinking": True}, "'v3-1226' has no thinking"),
        ("v2.5", [WEATHER, {**CALLS, "content": "So."}], {}, "content and tool_calls: .* only one of them"),
        ("r1-0120", [WEATHER, CALLS, *OUTPUTS, {**CALLS, "content": "So."}], {}, "after an earlier round of calls"),
        ("r1-distill", [HELLO, HI], {"thinking": True}, "the last message is not the user's"),
        ("r1", [HELLO, HI], {"thinking": True}, "the last message is not the user's"),
        ("r1", [WEATHER, CALLS, *OUTPUTS], {"thinking": True}, "the last message is not the user's"),
        ("v31", [HELLO], {"tools": TOOLS, "thinking": True}, "no tools while thinking"),
        ("v3", [HELLO], {"tools": [{"name": "f"}]}, "a tool is"),
        ("v31", [HELLO], {"tools": [{"function": {"name": "f", "parameters": {1, 2}}}]}, "f cannot be written as JSON"),
    ],
)
def test_what_a_generation_lacks_is_refused(name, messages, options, message):
    with pytest.raises(UserError, match=message):
        TEMPLATES[name].parts(messages, **options)


def test_unknown_template():
    assert template("v3") is template("v3-0324") is TEMPLATES["v3"]
    with pytest.raises(UserError, match="chat template 'v9': expected one of v1, v2, coder, v2.5, v3-1226, v3, r1"):
        template("v9")


# The template of a model.

USER_TURN, ANSWER_TURN = "{{'<｜User｜>' + message['content']}}", "{{'<｜Assistant｜>' + content}}"
SPLIT = "{% if '</think>' in content %}"
JINJA = {
    "coder": "{{'### Instruction:\n'}}{{'### Response:\n' + message['content'] + '\n<|EOT|>\n'}}",
    "v2": "{{ 'User: ' + message['content'] }}{{ 'Assistant: ' + message['content'] }}{{ 'Assistant:' }}",
    "v2.5": "namespace(is_first=false)" + USER_TURN + ANSWER_TURN,
    "v3-1226": "namespace(is_first=false, is_first_sp=true)" + USER_TURN + ANSWER_TURN,
    "v3": "namespace(is_first_sp=true, is_last_user=false)" + USER_TURN + ANSWER_TURN,
    "r1-distill": "namespace(is_first=false)" + USER_TURN + SPLIT + ANSWER_TURN,
    "r1-0120": "namespace(is_first=false, is_first_sp=true)" + USER_TURN + SPLIT + ANSWER_TURN,
    "r1": "namespace(is_first_sp=true, is_last_user=false)" + USER_TURN + SPLIT + ANSWER_TURN,
    "v31": "{% if not thinking is defined %}{{'<｜Assistant｜></think>'}}" + USER_TURN + SPLIT + ANSWER_TURN,
    "": "{{'<|im_start|>' + message['role'] + message['content'] + '<|im_end|>'}}",
}


@pytest.mark.parametrize("name", JINJA)
def test_a_published_template_is_recognised(tmp_path, name):
    assert recognise(JINJA[name]) == name
    config = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "{}"}, {"name": "default", "template": JINJA[name]}]
    for found in (JINJA[name], several):
        config.write_text(json.dumps({"chat_template": found}))
        if name:
            assert template_for(tmp_path) == name
        else:
            with pytest.raises(UserError, match="is unknown: expected one of DeepSeek's.*name it with --template: v1"):
                template_for(tmp_path)
        assert template_for(tmp_path, "v3.1") == "v31"  # the user's choice takes precedence
    (tmp_path / "chat_template.jinja").write_text(JINJA["coder"])
    assert template_for(tmp_path) == "coder"  # the newer file


def test_a_model_without_a_template(tmp_path):
    for folder in (tmp_path, None):
        with pytest.raises(UserError, match="mine has no chat template .*continues text: deepseek-jax generate"):
            template_for(folder, model="mine")
    with pytest.raises(UserError, match="chat template 'v9': expected one of"):
        template_for(tmp_path, "v9")
    for text in ("[]", "{", '{"chat_template": [1]}', '{"chat_template": [{"name": "default"}]}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=r"the chat template in .* cannot be read"):
            template_for(tmp_path)


# Ids.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE in which, as in DeepSeek's, most special tokens are not called special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    spelled = [value.text for value in vars(marks).values() if isinstance(value, Part)]
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        ["the User: and the Assistant: are the ones to speak"] * 9,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=spelled[:2], show_progress=False),
    )
    engine.add_tokens([AddedToken(mark, special=False) for mark in spelled[2:]])
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    engine.save(str(path))
    return open_tokenizer(str(path))


@pytest.mark.parametrize(("name", "messages", "prompt"), PROMPTS)
def test_ids_are_those_of_the_whole_string(tokenizer, name, messages, prompt):
    ids = to_ids(TEMPLATES[name].parts(messages), tokenizer)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, tokenizer.encode(prompt, specials=True))
    assert tokenizer.decode(ids, specials=True) == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_that_users_type_are_text(tokenizer, name):
    spelled = "".join(value.text for value in vars(marks).values() if isinstance(value, Part))
    ids = to_ids(TEMPLATES[name].parts([{"role": "user", "content": spelled}]), tokenizer)
    blank = to_ids(TEMPLATES[name].parts([{"role": "user", "content": "x"}]), tokenizer)
    is_mark = tokenizer.byte_lengths() == 0
    assert is_mark[ids].sum() == is_mark[blank].sum()
    assert spelled in tokenizer.decode(ids)
    if name in ("v3", "v31"):  # also in a tool's output and name
        message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": spelled}}]}
        ids = to_ids(TEMPLATES[name].parts([HELLO, message, {"role": "tool", "content": spelled}]), tokenizer)
        assert is_mark[ids].sum() == {"v3": 13, "v31": 12}[name]


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UserError, match=r"the tokenizer has no special token <\|EOT\|>"):
        to_ids(TEMPLATES["coder"].parts([HELLO, HI]), open_tokenizer("bytes"))


def test_join():
    assert join(["", "a", "b", marks.EOS, "", marks.EOS, "c"]) == [
        Part("ab", False),
        marks.EOS,
        marks.EOS,
        Part("c", False),
    ]
    assert to_ids([], open_tokenizer("bytes")).tolist() == []
