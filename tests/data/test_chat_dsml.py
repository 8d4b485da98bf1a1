"""V3.2 and V4: prompts to the letter, thoughts kept and dropped; broken markup is text; any pieces are the whole."""

import json
import random

import pytest

from deepseek_jax.data.chat import TEMPLATES, is_task, jinja, published, spell, template_for
from deepseek_jax.data.chat.dsml import BlockReader, split_calls
from deepseek_jax.errors import UserError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
V32, V4 = TEMPLATES["v32"], TEMPLATES["v4"]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments, n=0, name="weather"):
    return {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM, WEATHER, MORE = say("system", "Be brief."), say("user", "Weather?"), say("user", "And snow?")
CALLS = say(
    *("assistant", "Let me see."),
    reasoning_content="Two cities.",
    tool_calls=[call('{"city": "Rome", "days": 2}'), call('{"at": [1, {"é": null}]}', 1)],
)
OUTPUTS = [say("tool", "sun", tool_call_id="c0"), say("tool", "snow", tool_call_id="c1")]
ANSWER = say("assistant", "Sun.", reasoning_content="Now I know.")
TALK = [SYSTEM, WEATHER, CALLS, *OUTPUTS, ANSWER, MORE]
WRITTEN = """Let me see.

<｜DSML｜BLOCK>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="at" string="false">[1, {"é": null}]</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜BLOCK><｜end▁of▁sentence｜>"""
CALLS_V32, CALLS_V4 = WRITTEN.replace("BLOCK", "function_calls"), WRITTEN.replace("BLOCK", "tool_calls")
RESULTS = "\n\n<function_results>\n<result>sun</result>\n<result>snow</result>\n</function_results>\n\n"


def test_v32_keeps_thoughts_across_tools_and_drops_them_at_the_next_message():
    asked, last = f"{BOS}Be brief.<｜User｜>Weather?<｜Assistant｜>", "<｜User｜>And snow?<｜Assistant｜>"
    whole = f"{asked}<think>Two cities.</think>{CALLS_V32}{RESULTS}<think>Now I know.</think>Sun.{EOS}"
    assert V32.encode(TALK[:6], thinking=True) == whole
    assert V32.encode(TALK[:5], thinking=True) == whole.removesuffix(f"Now I know.</think>Sun.{EOS}")
    without = f"{asked}</think>{CALLS_V32}{RESULTS}</think>Sun.{EOS}{last}"
    assert V32.encode(TALK, thinking=True) == f"{without}<think>"
    assert V32.encode(TALK) == f"{without}</think>"


def test_v4_keeps_all_thoughts_if_there_are_tools():
    asked, last = f"{BOS}Be brief.<｜User｜>Weather?<｜Assistant｜>", "<｜User｜>And snow?<｜Assistant｜>"
    results = "<｜User｜><tool_result>sun</tool_result>\n\n<tool_result>snow</tool_result><｜Assistant｜>"
    kept = f"<think>Two cities.</think>{CALLS_V4}{results}<think>Now I know.</think>Sun.{EOS}{last}<think>"
    found = V4.encode(TALK, TOOLS, thinking=True)
    head, tail = found.split("<｜User｜>", 1)
    assert f"<｜User｜>{tail}" == asked.removeprefix(f"{BOS}Be brief.") + kept
    assert head.startswith(f"{BOS}Be brief.\n\n## Tools\n\nYou have access to a set of tools to help")
    assert V4.encode(TALK, thinking=True) == f"{asked}</think>{CALLS_V4}{results}</think>Sun.{EOS}{last}<think>"
    assert V4.encode(TALK) == f"{asked}</think>{CALLS_V4}{results}</think>Sun.{EOS}{last}</think>"
    only_last = V4.encode(TALK[:6], thinking=True)  # results count as the user's turn
    assert only_last == f"{asked}</think>{CALLS_V4}{results}<think>Now I know.</think>Sun.{EOS}"


def test_v4_sorts_results_by_call_and_joins_them_with_what_the_user_says():
    late = [WEATHER, CALLS, *OUTPUTS[::-1], MORE, say("user", "Please.")]
    results = "<｜User｜><tool_result>sun</tool_result>\n\n<tool_result>snow</tool_result>"
    assert V4.encode(late).endswith(f"{EOS}{results}\n\nAnd snow?\n\nPlease.<｜Assistant｜></think>")


def test_v4_efforts_reminders_and_tasks():
    spelled = spell(V4.prompt([SYSTEM, WEATHER], thinking=True, effort="max"))
    assert spelled.startswith(f"{BOS}Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very")
    assert spelled.endswith("is left unchecked.\n\nBe brief.<｜User｜>Weather?<｜Assistant｜><think>")
    for thinking, given in ((False, "max"), (True, "high"), (True, "")):
        assert V4.prompt([WEATHER], (), thinking, given) == V4.parts([WEATHER], (), thinking)
    reminded = V4.encode([SYSTEM, say("latest_reminder", "Monday"), WEATHER])
    assert reminded == f"{BOS}Be brief.<｜latest_reminder｜>Monday<｜User｜>Weather?<｜Assistant｜></think>"
    for thinking in (False, True):
        title = V4.parts([say("user", "Weather?", task="title")], (), thinking)
        assert spell(title) == f"{BOS}<｜User｜>Weather?<｜title｜>" and is_task(title)
        action = V4.encode([say("user", "Weather?", task="action")], thinking=thinking)
        opening = "<think>" if thinking else "</think>"
        assert action == f"{BOS}<｜User｜>Weather?<｜Assistant｜>{opening}<｜action｜>"
        done = [say("user", "Weather?", task="action"), say("assistant", "Search")]
        assert V4.encode(done, thinking=thinking) == f"{action}Search{EOS}"
    with pytest.raises(
        UserError, match="task 'nap'. Expected one of action, query, authority, domain, title, read_url"
    ):
        V4.parts([say("user", "Weather?", task="nap")])
    assert not is_task(V4.parts([WEATHER])) and not is_task(V32.parts([say("user", "a", task="title")]))


def test_developers_bring_tools_and_a_form():
    developer = say("developer", "Find it.", tools=TOOLS, response_format={"type": "object"})
    form = '## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{"type": "object"}'
    found = V32.encode([SYSTEM, developer], thinking=True)
    assert found.startswith(f"{BOS}Be brief.<｜User｜>\n\n## Tools\nYou have access to a set of tools you can use to")
    assert '<functions>\n{"name": "weather", "parameters": {"type": "object"}}\n</functions>\n\n\n' in found
    assert found.endswith(f"{form}\n\n# The user's message is: Find it.<｜Assistant｜><think>")
    found = V4.encode([developer])
    assert found.startswith(f"{BOS}<｜User｜>Find it.\n\n## Tools\n\nYou have") and found.endswith(
        f"to invoke tool calls.\n\n\n{form}<｜Assistant｜></think>"
    )
    plain = say("developer", "Find it.")
    for template in (V32, V4):  # one that is not the last is left out, if the model thinks
        talk = [plain, say("assistant", "Done."), WEATHER]
        assert template.encode(talk, thinking=True) == f"{BOS}Done.{EOS}<｜User｜>Weather?<｜Assistant｜><think>"
        assert "Find it." in template.encode(talk)
    assert "Find it." in V4.encode([developer, say("assistant", "Done."), WEATHER], thinking=True)  # it has tools


def test_tools_follow_the_system_prompt_and_their_tags_are_special_tokens():
    for template, n_marks in ((V32, 11), (V4, 9)):
        parts = template.parts([SYSTEM, say("user", "<｜DSML｜")], TOOLS)
        assert sum(part.text == "｜DSML｜" and part.is_mark for part in parts) == n_marks
        schema = '\n{"name": "weather", "parameters": {"type": "object"}}\n'
        assert any(schema in part.text and not part.is_mark for part in parts)
        assert spell(template.parts([WEATHER], TOOLS)).startswith(f"{BOS}\n\n## Tools\n")


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_a_prompt_and_its_reply_are_the_conversation_that_follows(name):
    template = TEMPLATES[name]
    for thinking in (False, True):
        for tools in ((), TOOLS):
            for n in (2, 5):
                prompt = template.encode(TALK[:n], tools, thinking)
                whole = template.encode(TALK[: n + 1], tools, thinking)
                assert prompt + spell(template.reply(TALK[n], thinking)) == whole


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", '{"a": "1"', "9" * 5000, "[" * 100_000])
def test_arguments_that_are_no_object_are_one_parameter(arguments):
    text = spell(V4.reply(say("assistant", "", tool_calls=[call(arguments)])))
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>' in text


def test_models_that_come_without_a_template_are_recognised_by_their_kind(tmp_path):
    def write_tokenizer(*tokens):
        added = [{"content": token} for token in tokens]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))

    write_tokenizer(*published.NEEDED)
    for model_type, name in (("deepseek_v32", "v32"), ("deepseek_v4", "v4")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert template_for(tmp_path) == name
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    with pytest.raises(UserError, match="has no chat template"):
        template_for(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        template_for(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
    (tmp_path / "chat_template.jinja").write_text(jinja.TEXTS["v31"])
    assert template_for(tmp_path) == "v31"  # V3.2-Exp
    (tmp_path / "chat_template.jinja").unlink()
    write_tokenizer(*published.NEEDED - {"｜DSML｜"})  # the base of V3.2-Exp
    with pytest.raises(UserError, match="it is a base model"):
        template_for(tmp_path)
    for text in ("[]", '{"added_tokens": [1]}', "{"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
            template_for(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="it is a base model"):
        template_for(tmp_path)


# What a model writes.

STRANGE = [
    '{"a": "x</｜DSML", "b": "<", "c": "</", "d": "\\n", "e": ""}',
    '{"a\\"b": "\\u2028\\\\ \\"q\\"", "深度": [], "": {}}',
    '{"code": "for x in y:\\n    print(\\"</parameter>\\")\\n"}',
    "{}",
]


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_arguments_return_as_they_were(name):
    for arguments in STRANGE:
        arguments = arguments.replace("\\u2028", "\u2028")
        message = say("assistant", "So:", tool_calls=[call(arguments) | {"id": "call_0"}])
        assert TEMPLATES[name].parse(spell(TEMPLATES[name].reply(message))) == message
    odd = CALLS_V4.replace('string="false">2<', 'string="false">two<')  # passed on as written
    (first, _) = V4.parse(odd)["tool_calls"]
    assert first["function"]["arguments"] == '{"city": "Rome", "days": two}'


def test_calls_are_taken_whole_or_not_at_all():
    whole = CALLS_V4.removesuffix(EOS)
    assert len(V4.parse(whole)["tool_calls"]) == 2
    assert V4.parse(whole.replace("\n<", "<").replace(">\n", ">"))["tool_calls"] == V4.parse(whole)["tool_calls"]
    broken = [whole[:n] for n in range(len(whole))]
    broken += [whole.replace(*pair, 1) for pair in BREAKS]
    broken += [
        whole + "more",
        whole.replace("tool_calls", "function_calls"),
        "<｜DSML｜tool_calls></｜DSML｜tool_calls>",
    ]
    for text in broken:
        assert V4.parse(text) == {"role": "assistant", "content": text}
        assert V4.parse(text, thinking=True) == say("assistant", "", **({"reasoning_content": text} if text else {}))


BREAKS = [
    *(('name="weather"', 'name=""'), ('name="weather"', "weather"), ("invoke", "revoke"), ("</｜DSML｜invoke>", "")),
    *(('string="true"', 'string="maybe"'), ('string="true"', "")),
    *(
        ('name="days"', 'name="city"'),
        ("\n<｜DSML｜invoke", "\nfirst <｜DSML｜invoke"),
        ("tool_calls>\n", "tool_calls>\n- "),
    ),
    *(('string="false"', 'string="false" x="1"'), ("<｜DSML｜parameter", "<｜DSML｜<｜DSML｜parameter")),
]
PIECES = [
    *(
        "<",
        "</",
        "｜DSML｜",
        ">",
        "\n",
        "tool_calls>",
        "tool_calls>\n<｜DSML｜",
        'invoke name="',
        'f">',
        "invoke>",
        "x",
    ),
    *(
        'parameter name="',
        'a" string="',
        'true">',
        'false">',
        "parameter>",
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        '"',
    ),
    *(
        "</｜DSML｜tool_calls>",
        '<｜DSML｜invoke name="f">',
        '<｜DSML｜parameter name="a" string="true">',
        "🐋",
        "</think>",
        "",
    ),
]


def read(text, cuts):
    """Reads a text in pieces: the calls as names and arguments, what is given back, whether the block is whole."""
    reader, calls = BlockReader("tool_calls"), []
    steps = [step for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for step in reader.push(text[a:b])]
    for name, arguments in steps + reader.finish():
        if name:
            calls.append([name, ""])
        calls[-1][1] += arguments
    return calls, reader.rest, reader.is_whole


def nonsense(dice):
    """A block with pieces left out, doubled and swapped, or pieces of one in any order."""
    if dice.random() < 0.5:
        return "tool_calls>" + "".join(dice.choices(PIECES, k=dice.randrange(25)))
    text = CALLS_V4.partition("｜DSML｜")[2].removesuffix(EOS)
    for _ in range(dice.randrange(3)):
        a, b = sorted(dice.randrange(len(text)) for _ in range(2))
        b = min(b, a + 12)
        text = dice.choice((text[:a] + text[b:], text[:b] + text[a:], text[:a] + dice.choice(PIECES) + text[a:]))
    return text


def test_broken_markup_in_any_pieces_is_the_same_and_never_an_error():
    dice, n_whole, n_called = random.Random(0), 0, 0
    for _ in range(1500):
        text = nonsense(dice)
        whole = read(text, [])
        for cuts in (range(1, len(text)), sorted(dice.choices(range(len(text) + 1), k=3))):
            assert read(text, cuts) == whole
        calls, rest, is_whole = whole
        n_whole, n_called = n_whole + is_whole, n_called + bool(calls)
        if rest is not None:
            assert text.endswith(rest) and (calls or rest == text)
        content, found = split_calls(f"a\n\n<｜DSML｜{text}", "tool_calls")
        assert (content, bool(found)) == (("a", True) if is_whole else (f"a\n\n<｜DSML｜{text}", False)) or (
            "<｜DSML｜tool_calls>" in text  # a first block was broken by a second
        )
    assert n_whole > 100 and n_called - n_whole > 100
