"""V4 as OpenAI's own client sees it: thoughts, effort, tools that are called in DSML, quick tokens."""

import json

import pytest

from deepseek_jax.data.tokenizer import open_tokenizer
from tests.serve.scripted import ASK, END, Script, serve

DEEPSEEK = open_tokenizer("deepseek")
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
CALL = """Hm.</think>Let me see.

<｜DSML｜tool_calls>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Köln "am Rhein"</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls><｜end▁of▁sentence｜>"""
ARGUMENTS = {"city": 'Köln "am Rhein"', "days": 2}


class Whale(Script):
    """Says texts in the tokens of V4."""

    longest = 2000

    def __init__(self):
        super().__init__(DEEPSEEK)


@pytest.fixture(scope="module")
def script():
    return Whale()


@pytest.fixture(scope="module")
def served(script):
    made = serve(
        script, "v4", tokenizer=DEEPSEEK, end_ids=(DEEPSEEK.eos_id,), n_positions=2400, keys=("secret", "other")
    )
    yield made
    made.stop()


def asked(client, messages=ASK, **options):
    body = {key: options.pop(key) for key in ("thinking",) if key in options}
    return client.chat.completions.create(model="mine", messages=messages, extra_body=body, **options)


def test_thinking_and_effort_are_switches(client, script):
    script.answer = lambda prompt: "Hm.</think>Two." + END if prompt.endswith("<think>") else "Two." + END
    for options, opening in [
        ({}, "<think>"),  # as DeepSeek's server does
        ({"reasoning_effort": "low"}, "<think>"),
        ({"reasoning_effort": "none"}, "</think>"),
        ({"thinking": {"type": "disabled"}}, "</think>"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "max"}, "<think>"),
        ({"reasoning_effort": "xhigh"}, "<think>"),
    ]:
        message = asked(client, **options).choices[0].message
        assert script.prompts[-1].endswith(f"<｜User｜>1+1=?<｜Assistant｜>{opening}")
        assert message.content == "Two." and hasattr(message, "reasoning_content") == (opening == "<think>")
        is_max = options.get("reasoning_effort") in ("max", "xhigh")
        assert script.prompts[-1].startswith("<｜begin▁of▁sentence｜>Reasoning Effort: Absolute maximum") == is_max


@pytest.mark.parametrize("speed", [1, 3, 100])
def test_a_call_is_streamed_while_it_is_written(client, script, speed):
    script.answer, script.speed = lambda prompt: CALL, speed
    chunks = list(asked(client, tools=TOOLS, stream=True))
    assert '{"name": "weather", "parameters": {' in script.prompts[0]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function.name] == ["weather"] and {c.index for c in calls} == {
        0
    }
    assert json.loads("".join(call.function.arguments for call in calls)) == ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and (speed > 3 or len(calls) > 4)


def test_results_go_back_with_the_thought(client, script):
    script.answer = lambda prompt: CALL
    message = asked(client, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == ARGUMENTS
    said = message.model_dump(exclude_none=True)
    script.answer = lambda prompt: "So.</think>Sun." + END
    result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    found = asked(client, [*ASK, said, result], tools=TOOLS).choices[0]
    assert found.message.content == "Sun." and found.finish_reason == "stop"
    end = "<｜User｜><tool_result>sun</tool_result><｜Assistant｜><think>"
    assert script.prompts[1].endswith(f"<｜Assistant｜><think>{CALL}{end}")


def test_a_quick_token_is_answered_at_once(client, script):
    script.answer = lambda prompt: " A sum" + END
    found = asked(client, [ASK[0] | {"task": "title"}]).choices[0]
    assert script.prompts[0].endswith("<｜User｜>1+1=?<｜title｜>")
    assert found.message.content == " A sum" and not hasattr(found.message, "reasoning_content")


def test_broken_markup_is_content(client, script):
    script.answer = lambda prompt: CALL.replace("invoke name", "call name")
    found = asked(client, tools=TOOLS).choices[0]
    assert found.message.content == CALL.replace("invoke name", "call name").removeprefix("Hm.</think>").removesuffix(
        END
    )
    assert found.message.tool_calls is None and found.finish_reason == "stop"
