"""Answers in a given form over HTTP: JSON, JSON of a schema, calls of tools."""

import asyncio
import json
import threading

import openai
import pytest

from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api.compiling import MOST_AT_ONCE, Compiling
from tests.serve.scripted import ASK, END, SCHEMA, Script, ask, message_of, serve

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_of_a_schema(client, script):
    script.answer = lambda prompt: '{"name": "'
    ask = {"model": "mine", "messages": ASK, "response_format": SCHEMA(PERSON), "n": 3}
    for choice in client.chat.completions.create(**ask).choices:
        assert choice.finish_reason == "stop"
        assert 0 <= json.loads(choice.message.content)["age"] <= 99
    script.answer = lambda prompt: 'Sure: {"a": [1, "</think>"]}' + END
    ask["response_format"] = {"type": "json_object"}
    assert client.chat.completions.create(**ask).choices[0].message.content.startswith("{")


def test_the_form_of_an_answer_begins_after_its_thought(client, script):
    script.answer = lambda prompt: '<think>\nHm.\n</think>{"name": "Bo", "age": 7}' + END
    found = client.chat.completions.create(model="mine", messages=ASK, response_format=SCHEMA(PERSON))
    message = found.choices[0].message
    assert (message.reasoning_content, json.loads(message.content)) == ("Hm.", {"name": "Bo", "age": 7})


def test_a_tool_that_must_be_called_needs_a_format_of_calls(client):
    tool = {"type": "function", "function": {"name": "a"}}
    for choice in ("required", {"type": "function", "function": {"name": "a"}}):
        with pytest.raises(openai.BadRequestError, match="tokenizer has no special token <｜tool▁calls▁begin｜>"):
            client.chat.completions.create(model="mine", messages=ASK, tools=[tool], tool_choice=choice)


def test_calls_arrive_piece_by_piece_and_name_and_id_once():
    """Also where a whole call comes in one step, and where its arguments end in a number or a nested object."""
    tokenizer = open_tokenizer("deepseek")
    script = Script(tokenizer)
    made = serve(script, name="v31", tokenizer=tokenizer, end_ids=(tokenizer.eos_id,), n_positions=900)
    marks = {"{": "<｜tool▁call▁begin｜>", "|": "<｜tool▁sep｜>", "}": "<｜tool▁call▁end｜>"}
    calls = [
        ("add", '{"a": 1, "b": {"c": [true, null]}}'),
        ("say", '{"text": "' + "long and " * 30 + '"}'),
        ("now", "{}"),
    ]
    said = "".join(marks["{"] + name + marks["|"] + arguments + marks["}"] for name, arguments in calls)
    script.answer = lambda prompt: "So: <｜tool▁calls▁begin｜>" + said + "<｜tool▁calls▁end｜>" + END
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name, _ in calls]
    ask = {"model": "mine", "messages": ASK, "tools": tools}
    with openai.OpenAI(base_url=made.url, api_key="any", max_retries=0) as client:
        (whole,) = client.chat.completions.create(**ask).choices
        assert whole.finish_reason == "tool_calls" and whole.message.content == "So: "
        assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == calls
        for speed in (1, 7, 500):
            script.speed, found, n_pieces = speed, {}, 0
            for chunk in client.chat.completions.create(**ask, stream=True):
                for call in chunk.choices[0].delta.tool_calls or ():
                    n_pieces += 1
                    assert (call.index in found) != bool(call.id) and bool(call.id) == bool(call.function.name)
                    name, arguments = found.get(call.index, (call.function.name, ""))
                    found[call.index] = name, arguments + call.function.arguments
            assert [found[n] for n in range(3)] == calls
            assert (n_pieces > 40) == (speed == 1)
    made.stop()


def test_a_schema_that_takes_too_long_is_refused_and_holds_up_no_others(monkeypatch):
    gate, seen = threading.Event(), []

    class Grammars:
        def compile(self, grammar):
            seen.append(grammar)
            gate.wait(20)

    monkeypatch.setattr("deepseek_jax.serve.api.compiling.MOST_S", 0.05)
    monkeypatch.setattr("deepseek_jax.serve.api.service.Grammars", lambda *_: Grammars())
    made = serve(Script())
    body = {"messages": ASK, "response_format": {"type": "json_object"}}
    for _ in range(MOST_AT_ONCE + 1):
        status, found = ask(made, "POST", "/chat/completions", body)
        assert status == 400 and "expected a simpler one" in message_of(found)
    assert len(seen) == MOST_AT_ONCE
    assert ask(made, "POST", "/chat/completions", {"messages": ASK})[0] == 200
    gate.set()
    made.stop()


def test_a_compiler_that_fails_in_any_way_refuses_the_schema():
    class Panic(BaseException):
        pass

    def panic(grammar):
        raise Panic

    async def several():
        compiling = Compiling(panic)
        for _ in range(MOST_AT_ONCE + 1):
            with pytest.raises(UserError, match="cannot be followed: Panic"):
                await compiling("")

    asyncio.run(several())


PATTERNS = {  # for some of which others take exponential time or memory, with the status that is expected
    "^(a+)+b$": 200,
    "^(a|a)*(a|aa)+b$": 200,
    "^((((a{1,50}){1,50}){1,50}){1,50}){1,50}$": 200,
    "^[ab]{1,9000000}$": 200,
    "^(a|b)*a(a|b){400}$": 200,
    "^(?=a*b)a+b$": 400,
    "^(a+)\\1$": 400,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_are_hard_are_followed_or_refused(served, client, script, pattern):
    script.answer = lambda prompt: '"' + "a" * 30
    body = {"messages": ASK, "response_format": SCHEMA({"type": "string", "pattern": pattern}), "max_tokens": 40}
    status, found = ask(served, "POST", "/chat/completions", body)
    assert status == PATTERNS[pattern]
    if status == 200:  # as far as the compiler's limits allow: an answer that they end is cut
        choice = found["choices"][0]
        text = choice["message"]["content"]
        assert text.startswith('"' + "a" * 10)
        assert choice["finish_reason"] == ("stop" if text.endswith('"') else "length")
    assert ask(served, "POST", "/chat/completions", {"messages": ASK})[0] == 200
