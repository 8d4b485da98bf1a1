"""POST /completions, and the tokenizer over HTTP."""

from tests.serve.scripted import ASK, BYTES, END, Script, ask, message_of, serve


def test_a_text_is_continued(client, script):
    script.answer = lambda prompt: " world" + END
    found = client.completions.create(model="mine", prompt="Hello")
    assert (found.choices[0].text, found.choices[0].finish_reason, found.object) == (
        " world",
        "stop",
        "text_completion",
    )
    assert script.prompts == ["Hello"]
    found = client.completions.create(model="mine", prompt=[[72, 105], [72]], max_tokens=2)
    assert [choice.text for choice in found.choices] == [" w", " w"]
    assert script.prompts[1:] == ["Hi", "H"] and found.usage.prompt_tokens == 3
    chunks = list(client.completions.create(model="mine", prompt="Hello", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == " world"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_prompt_of_ids_that_ends_within_a_character_is_not_said_again(served, client, script):
    """The answer begins with the character's last byte, which alone is not a character, streamed or whole."""
    script.answer = lambda prompt: [0xA5, *"本!".encode(), BYTES.eos_id]
    body = {"prompt": [*"日".encode(), 0xE6, 0x97], "echo": False}
    text = ask(served, "POST", "/completions", body)[1]["choices"][0]["text"]
    assert text == "\ufffd本!"
    for speed in (1, 2, 4):
        script.speed = speed
        with client.completions.create(model="mine", **body, stream=True) as chunks:
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
    echoed = ask(served, "POST", "/completions", body | {"echo": True})[1]["choices"][0]["text"]
    assert echoed == "日\ufffd" + text and script.prompts == ["日\ufffd"] * 5


def test_a_gap_is_filled(client, script):
    client.completions.create(model="mine", prompt="def f(x):\n", suffix="\nf(1)")
    assert script.prompts[0].endswith("<｜fim▁begin｜>def f(x):\n<｜fim▁hole｜>\nf(1)<｜fim▁end｜>")


def test_a_stop_string_at_the_last_token_is_a_stop(served, script):
    script.answer = lambda prompt: "one STOP" + END
    body = {"prompt": "a", "stop": "STOP", "max_tokens": 8}
    choice = ask(served, "POST", "/completions", body)[1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")


def test_log_probabilities_of_a_prompt(served, client, script):
    """As evaluations ask for them: prompts of ids, echoed, and one token more, or none."""
    prompt = BYTES.encode("Ask me").tolist()
    body = {"prompt": [prompt], "echo": True, "logprobs": 1}
    for n_new, said in ((1, "H"), (0, "")):
        found = ask(served, "POST", "/completions", body | {"max_tokens": n_new})[1]["choices"][0]
        scores = found["logprobs"]
        assert found["text"] == "Ask me" + said and found["finish_reason"] == "length"
        assert scores["tokens"] == list("Ask me" + said) and scores["text_offset"] == list(range(6 + n_new))
        assert scores["token_logprobs"] == [None, *(-ord(letter) / 64 for letter in ("Ask me" + said)[1:])]
        assert scores["top_logprobs"] == [None, *({letter: -ord(letter) / 64} for letter in ("Ask me" + said)[1:])]
    with client.completions.create(model="mine", prompt="Ask", echo=True, logprobs=0, stream=True) as chunks:
        choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == "AskHi!"
    assert [offset for one in choices if one.logprobs for offset in one.logprobs.text_offset][:6] == [0, 1, 2, 3, 4, 5]
    status, found = ask(served, "POST", "/completions", {"prompt": "Ask", "max_tokens": 0})
    assert status == 400 and "expected 1 or more, or echo=true" in message_of(found)


def test_ids_over_http(served, client):
    assert ask(served, "POST", "/tokenize", {"prompt": "<think>é"})[1] == {
        "tokens": list("<think>é".encode()),
        "count": 9,
        "max_model_len": 500,
    }
    assert ask(served, "POST", "/v1/tokenize", {"prompt": END})[1]["tokens"] == [BYTES.eos_id]
    n_tokens = ask(served, "POST", "/tokenize", {"messages": ASK})[1]["count"]
    assert client.chat.completions.create(model="mine", messages=ASK).usage.prompt_tokens == n_tokens
    assert ask(served, "POST", "/detokenize", {"tokens": [72, 105, BYTES.eos_id]})[1] == {"prompt": "Hi" + END}
    assert ask(served, "GET", "/tokenizer_info")[1]["eos_token"] == END
    assert ask(served, "POST", "/detokenize", {"tokens": [9999]})[0] == 400
    assert ask(served, "POST", "/tokenize", {})[0] == 400


def test_a_base_model_has_no_chat():
    made = serve(Script(), name=None)
    status, found = ask(made, "POST", "/chat/completions", {"messages": ASK})
    assert status == 400 and "it continues texts" in message_of(found)
    assert ask(made, "POST", "/completions", {"prompt": "Hello"})[1]["choices"][0]["text"] == "Hi!"
    made.stop()
