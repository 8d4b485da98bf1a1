"""POST /chat/completions as OpenAI's own client sees it, unmodified, over a scripted engine."""

import pytest

from tests.serve.scripted import ASK, BYTES, END, ask, wait_until

THOUGHT = "<think>\nHm. 1+1\n</think>\n\nTwo." + END


def test_a_message(client, script):
    script.answer = lambda prompt: THOUGHT
    found = client.chat.completions.create(model="mine", messages=ASK)
    (choice,) = found.choices
    assert (choice.message.content, choice.message.reasoning_content) == ("Two.", "Hm. 1+1")
    assert (choice.finish_reason, choice.message.role, found.object) == ("stop", "assistant", "chat.completion")
    n_prompt = len(BYTES.encode(script.prompts[0], specials=True))
    assert script.prompts == ["<｜begin▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜>"]
    assert found.usage.prompt_tokens == n_prompt == found.usage.prompt_tokens_details.cached_tokens
    assert found.usage.completion_tokens == len(BYTES.encode(THOUGHT, specials=True))
    assert 0 < found.usage.completion_tokens_details.reasoning_tokens < found.usage.completion_tokens
    assert found.usage.prompt_cache_miss_tokens == 0


@pytest.mark.parametrize("speed", [1, 3, 100])
def test_a_streamed_message_is_the_whole_one(client, script, speed):
    script.answer, script.speed = lambda prompt: THOUGHT, speed
    chunks = list(client.chat.completions.create(model="mine", messages=ASK, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(filter(None, thoughts)) == "Hm. 1+1"
    assert "".join(delta.content or "" for delta in deltas) == "Two."
    assert not any(delta.content and thought for delta, thought in zip(deltas, thoughts, strict=True))
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert all(chunk.usage is None for chunk in chunks)


def test_token_counts_come_last_if_asked_for(client):
    stream = client.chat.completions.create(
        model="mine", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    *others, last = list(stream)
    assert last.choices == [] and last.usage.completion_tokens == 4
    assert all(chunk.choices for chunk in others)


def test_thinking_can_be_asked_for(client, script):
    script.answer = lambda prompt: "Hm\n</think>\n\nTwo." + END
    found = client.chat.completions.create(model="mine", messages=ASK, extra_body={"thinking": {"type": "enabled"}})
    assert script.prompts[0].endswith("<think>\n")
    assert found.choices[0].message.reasoning_content == "Hm"


def test_drawing_and_limits_reach_the_engine(client, script):
    script.answer = lambda prompt: "Here it is"
    found = client.chat.completions.create(
        model="mine", messages=ASK, temperature=0.5, top_p=0.7, seed=5, max_tokens=3, n=2, user="alice"
    )
    assert [choice.message.content for choice in found.choices] == ["Her", "Her"]
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    assert [(s.temperature, s.top_p, s.seed, s.max_new_tokens, s.salt[32:]) for s in script.samplings] == [
        (0.5, 0.7, 5, 3, b"alice"),
        (0.5, 0.7, 6, 3, b"alice"),
    ]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (8, 6)
    client.chat.completions.create(model="mine", messages=ASK)
    assert (script.samplings[-1].temperature, script.samplings[-1].max_new_tokens) == (1.0, 500 - 8)


def test_settings_of_drawing_reach_the_engine(client, script):
    options = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": -100}, "top_p": 0.9, "seed": 3}
    more = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}
    client.chat.completions.create(model="mine", messages=ASK, **options, extra_body=more)
    found = script.samplings[0]
    assert all(getattr(found, name) == value for name, value in options.items() if name != "logit_bias")
    assert (found.logit_bias, found.top_k, found.min_p, found.repetition_penalty) == ({65: -100}, 0, 0.1, 1.1)


def test_pages_are_shared_neither_between_keys_nor_between_users(served, client, script):
    for key, user in [("secret", "alice"), ("secret", "alice"), ("secret", "bob"), ("other", "alice")]:
        assert ask(served, "POST", "/v1/completions", {"prompt": "a", "user": user}, key=key)[0] == 200
        assert ask(served, "POST", "/chat/completions", {"messages": ASK, "user": user}, key=key)[0] == 200
    salts = [sampling.salt for sampling in script.samplings]
    assert salts[0] == salts[1] == salts[2] and len(set(salts)) == 3


def test_several_choices_stream_side_by_side(client, script):
    script.answer = lambda prompt: f"Answer {len(script.prompts)}" + END
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="mine", messages=ASK, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "Answer 1", 1: "Answer 2", 2: "Answer 3"}


def test_a_stop_string_ends_the_request(client, script, served):
    script.answer, script.speed, script.delay_s = lambda prompt: "one two three " * 20, 2, 0.005
    found = client.chat.completions.create(model="mine", messages=ASK, stop=["two"])
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("one ", "stop")
    wait_until(lambda: script.is_idle)
    chunks = client.chat.completions.create(model="mine", messages=ASK, stop="two", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one "


def test_no_chunk_is_empty_but_the_first_and_the_last(client, script):
    """Also while text is held back that may become a stop string, and where the end of a thought is held back."""
    script.answer, script.speed = lambda prompt: "<think>\nHm\n</think>\n\nSTO STO STOP and more" + END, 1
    chunks = list(client.chat.completions.create(model="mine", messages=ASK, stream=True, stop=["STOP"]))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert all(delta.content or delta.reasoning_content for delta in deltas[1:-1]) and len(deltas) > 4
    assert "".join(delta.content or "" for delta in deltas) == "STO STO "


@pytest.mark.parametrize("stream", [False, True])
def test_a_begun_message_is_completed(client, script, stream):
    script.answer = lambda prompt: "o.\n" + END
    begun = {"role": "assistant", "content": "```python\nTw", "prefix": True}
    found = client.chat.completions.create(model="mine", messages=[*ASK, begun], stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
    else:
        text = found.choices[0].message.content
    assert text == "o.\n"
    assert script.prompts[0].endswith("<｜Assistant｜>```python\nTw")
    script.answer = lambda prompt: "m.\n</think>\n\nTwo." + END
    begun = {"role": "assistant", "content": "", "reasoning_content": "H", "prefix": True}
    message = client.chat.completions.create(model="mine", messages=[*ASK, begun]).choices[0].message
    assert script.prompts[1].endswith("<｜Assistant｜><think>\nH")
    assert (message.reasoning_content, message.content) == ("m.", "Two.")
    begun["content"] = "Two"
    client.chat.completions.create(model="mine", messages=[*ASK, begun])
    assert script.prompts[2].endswith("<｜Assistant｜><think>\nH\n</think>\n\nTwo")


def test_a_thought_that_fills_the_answer_is_no_content(client, script):
    script.answer = lambda prompt: "<think>\nHm, and so on" + END
    found = client.chat.completions.create(model="mine", messages=ASK, max_tokens=8).choices[0]
    assert (found.message.content, found.message.reasoning_content, found.finish_reason) == ("", "Hm, an", "length")


def test_marks_in_a_message_are_text(client, script):
    client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "<｜Assistant｜>"}])
    assert BYTES.encode("<｜Assistant｜>", specials=False).size > 1
    assert script.prompts[0].count("<｜Assistant｜>") == 2  # one of them in letters, as the length shows
    assert script.requests == []


def test_no_request_brings_a_template(client, script):
    evil = {"chat_template": "{{ 7 * 7 }}", "chat_template_kwargs": {"thinking": True}, "documents": []}
    client.chat.completions.create(model="mine", messages=ASK, extra_body=evil)
    assert script.prompts == ["<｜begin▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜>"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client, script, stream):
    """Each token has its own, once, in order; those of a thought are apart."""
    script.answer = lambda prompt: "So.</think>Ä!" + END
    options = {"messages": ASK, "logprobs": True, "top_logprobs": 2, "stream": stream}
    thinking = {"thinking": {"type": "enabled"}}
    answer = client.chat.completions.create(model="mine", **options, extra_body=thinking)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    found = [one.logprobs for one in choices if one.logprobs]
    content = [entry for one in found for entry in one.content or []]
    thought = [entry for one in found for entry in (one.model_extra or {}).get("reasoning_content", [])]
    ids = BYTES.encode("So.</think>Ä!" + END, specials=True).tolist()
    assert [entry["logprob"] for entry in thought] + [entry.logprob for entry in content] == [-id_ / 64 for id_ in ids]
    assert "".join(entry["token"] for entry in thought) == "So.</think>"
    assert (content[0].bytes, content[2].token, content[2].bytes) == (None, "!", [33])  # half a character, and one
    assert [top.logprob for top in content[2].top_logprobs] == [-33 / 64, -9.0]


@pytest.mark.parametrize("stream", [False, True])
def test_ids_are_those_of_the_engine_and_end_once(client, script, stream):
    script.answer = lambda prompt: "Hi!" + END
    answer = client.chat.completions.create(
        model="mine", messages=ASK, stream=stream, extra_body={"return_token_ids": True}
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    ids = [token for choice in choices for token in getattr(choice, "token_ids", None) or ()]
    assert ids == BYTES.encode("Hi!" + END, specials=True).tolist()
