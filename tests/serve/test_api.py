"""The server as clients see it: OpenAI's own client, unmodified, and plain HTTP, over a scripted engine.

The engine's model says given texts, a few tokens per step, so that what arrives is known to the letter.
"""

import asyncio
import http.client
import json
import random
import socket
import threading
import time
import types

import openai
import pytest

from deepseek_jax.data.chat import TEMPLATES
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api.app import make_server
from deepseek_jax.serve.api.compiling import MOST_AT_ONCE
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.engine import Logprob, Output, Sampling
from deepseek_jax.serve.worker import Dead, Worker

BYTES = open_tokenizer("bytes")
END = "<｜end▁of▁sentence｜>"


def score(token):
    """A log-probability that depends on the token; the likeliest tokens are this one and the one before."""
    return Logprob(-token / 64, [(token, -token / 64), (token - 1, -9.0)])


class Job:
    def __init__(self, ids, n_cached, options, prompt):
        self.ids, self.n_cached, self.options, self.prompt = ids, n_cached, options, prompt

    def scores(self, new):
        """What the engine reports beside new ids."""
        if self.options.logprobs is None:
            return ()
        n_top, prompt, self.prompt = self.options.logprobs, self.prompt, []
        found = [score(token)._replace(top=score(token).top[:n_top]) for token in [*prompt, *new]]
        recited = [None, *found[1 : len(prompt)]] if prompt and self.options.prompt_logprobs else []
        return found[len(prompt) :], recited


class Script:
    """An engine whose requests say `answer(prompt)`, `speed` tokens per step."""

    def __init__(self, tokenizer=BYTES):
        self.tokenizer = tokenizer
        self.answer, self.speed, self.requests, self.delay_s = lambda prompt: "Hi!" + END, 3, [], 0.0
        self.prompts, self.samplings = [], []
        scheduler, pages = types.SimpleNamespace(running=[]), types.SimpleNamespace(n_pages=9, n_free=8)
        self.ranks = [types.SimpleNamespace(scheduler=scheduler, pages=pages)]
        self.n_drafted, self.n_accepted = 5, 4

    def submit(self, prompt, sampling):
        if len(prompt) > 400:
            raise UserError("too long")
        self.prompts.append(self.tokenizer.decode(prompt, specials=True))
        self.samplings.append(sampling)
        said = self.answer(self.prompts[-1])
        ids = self.tokenizer.encode(said, specials=True).tolist()[: sampling.max_new_tokens]
        if sampling.constraint:
            ids = self.constrained(ids, sampling)
        self.requests.append(Job(ids, min(64, len(prompt)), sampling, prompt))
        return self.requests[-1]

    def constrained(self, ids, sampling):
        """What `ids` would be if after them, or after a wrong one, tokens were drawn from the allowed ones."""
        found, draw = [], random.Random(0)
        while len(found) < sampling.max_new_tokens and found[-1:] != [BYTES.eos_id]:
            bits = sampling.constraint.allowed()
            allowed = range(272) if bits is None else [v for v in range(272) if bits[v // 32] >> (v % 32) & 1]
            token = ids[len(found)] if len(found) < len(ids) and ids[len(found)] in allowed else draw.choice(allowed)
            sampling.constraint.push(token)
            found.append(token)
        return found

    def cancel(self, request):
        if request in self.requests:
            self.requests.remove(request)

    @property
    def is_idle(self):
        return not self.requests

    def step(self):
        if self.delay_s:
            time.sleep(self.delay_s)
        outputs = []
        for request in list(self.requests):
            new, request.ids = request.ids[: self.speed], request.ids[self.speed :]
            ending = "" if request.ids else "stop" if new[-1] in request.options.stop_ids else "length"
            outputs.append(Output(request, new, ending, *request.scores(new)))
            if ending:
                self.cancel(request)
        if any(output.ids == [0] for output in outputs):
            raise RuntimeError("the device is gone")
        return outputs


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def serve(script, name="r1", **options):
    options = {"name": "mine", "tokenizer": BYTES, "end_ids": (BYTES.eos_id,), "n_positions": 500} | options
    worker = Worker(script, options.pop("most", 8))
    service = Service(worker=worker, template=TEMPLATES[name] if name else None, **options)
    server = make_server(service, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    return types.SimpleNamespace(url=f"http://127.0.0.1:{port}", server=server, thread=thread, worker=worker)


@pytest.fixture(scope="module")
def script():
    return Script()


@pytest.fixture(scope="module")
def served(script):
    made = serve(script, keys=("secret", "other"))
    yield made
    made.server.should_exit = True
    made.thread.join(10)


@pytest.fixture
def client(served, script):
    wait_until(lambda: script.is_idle and served.worker.n_open == 0)
    script.__init__()
    with openai.OpenAI(base_url=served.url + "/v1", api_key="secret", max_retries=0) as made:
        yield made


def ask(served, method, path, body=None, key="secret"):
    """Returns (status, body as JSON)."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}".encode()} if key else {})
    data = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def message_of(found):
    return found["error"]["message"]


ASK = [{"role": "user", "content": "1+1=?"}]
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


def test_a_gap_is_filled(client, script):
    client.completions.create(model="mine", prompt="def f(x):\n", suffix="\nf(1)")
    assert script.prompts[0].endswith("<｜fim▁begin｜>def f(x):\n<｜fim▁hole｜>\nf(1)<｜fim▁end｜>")


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


def test_a_long_body_is_refused(served, client):
    status, found = ask(served, "POST", "/completions", b" " * (32 * 2**20 + 1))
    assert (status, found["error"]["type"]) == (413, "invalid_request_error")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["mine"]


def test_marks_in_a_message_are_text(client, script):
    client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "<｜Assistant｜>"}])
    assert BYTES.encode("<｜Assistant｜>", specials=False).size > 1
    assert script.prompts[0].count("<｜Assistant｜>") == 2  # one of them in letters, as the length shows
    assert script.requests == []


def test_settings_of_drawing_reach_the_engine(client, script):
    options = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": -100}, "top_p": 0.9, "seed": 3}
    more = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}
    client.chat.completions.create(model="mine", messages=ASK, **options, extra_body=more)
    found = script.samplings[0]
    assert all(getattr(found, name) == value for name, value in options.items() if name != "logit_bias")
    assert (found.logit_bias, found.top_k, found.min_p, found.repetition_penalty) == ({65: -100}, 0, 0.1, 1.1)


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


def SCHEMA(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


DEEP: dict = {"name": "f"}
for _ in range(100):
    DEEP = {"properties": DEEP, "name": "f"}

REFUSED = [
    ({"messages": []}, 422, "messages: List should have at least 1 item"),
    ({}, 422, "messages: Field required"),
    (b"{", 422, "JSON"),
    ({"messages": ASK, "temperature": 3}, 422, "temperature: Input should be less than or equal to 2"),
    ({"messages": ASK, "n": 1000}, 422, "n: Input should be less than or equal to 16"),
    ({"messages": ASK, "max_tokens": 0}, 422, "max_tokens"),
    ({"messages": ASK, "top_logprobs": 2}, 400, "top_logprobs=2 without logprobs"),
    ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, 422, "top_logprobs"),
    ({"messages": ASK, "presence_penalty": 2.5}, 422, "presence_penalty"),
    ({"messages": ASK, "logit_bias": {"x": 1}}, 422, "logit_bias"),
    ({"messages": ASK, "logit_bias": {"5": 101}}, 422, "logit_bias"),
    ({"messages": None}, 422, "messages: Field required"),
    ({"messages": ASK, "n": 9}, 400, "a request for 9 answers: expected 8 or fewer"),
    ({"messages": ASK, "response_format": {"type": "json_schema"}}, 400, "expected the schema"),
    ({"messages": ASK, "response_format": SCHEMA({"type": "nonsense"})}, 400, "cannot be followed: Invalid type"),
    ({"messages": ASK, "response_format": SCHEMA({"$ref": "http://localhost/x"})}, 400, "cannot be followed"),
    ({"messages": ASK, "response_format": SCHEMA({"pattern": "((a"} | {"type": "string"})}, 400, "cannot be followed"),
    ({"messages": ASK, "response_format": SCHEMA({"title": "x" * 200_000})}, 400, "expected at most 200000"),
    ({"messages": ASK, "tool_choice": "required"}, 400, "asks for a call of a tool: expected one of []"),
    ({"messages": ASK, "tool_choice": "some"}, 422, "tool_choice"),
    ({"messages": ASK, "tools": [{"type": "function", "function": DEEP}]}, 422, "nested deeper than 64"),
    ({"messages": ASK, "tools": [{"description": "x" * 10**6}]}, 422, "longer than 1000000 characters"),
    ({"messages": ASK, "response_format": SCHEMA(DEEP)}, 422, "nested deeper than 64"),
    ({"messages": ASK, "response_format": SCHEMA({"allOf": [{"pattern": "a"}] * 17})}, 400, "17 regular expressions"),
    ({"messages": [{"role": "assistant", "content": "Hi", "prefix": True}]}, 400, "no message before it"),
    ({"messages": ASK, "thinking": {"type": "perhaps"}}, 422, "thinking.type"),
    ({"messages": ASK, "model": "gpt-4o"}, 400, "model 'gpt-4o': this server has 'mine'"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, 400, "messages[0]"),
    ({"messages": [*ASK, {"role": "assistant", "content": "Hi"}]}, 400, "the last message is the assistant's"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "expected fewer than 500"),
    ({"messages": [{"role": "user", "content": "x" * 450}]}, 400, "too long"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_bad_requests_are_refused_in_words(served, client, body, status, message):
    found_status, found = ask(served, "POST", "/chat/completions", body)
    assert found_status == status and message in message_of(found)
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert served.worker.is_alive and served.worker.n_open == 0


@pytest.mark.parametrize(
    "path", ["/models", "/v1/models", "/beta/models", "/v1/chat/completions", "/v1/completions", "/metrics"]
)
@pytest.mark.parametrize("key", ["", "wrong", "secret2", "ключ"])
def test_every_route_asks_for_a_key(served, path, key):
    status, found = ask(served, "GET" if path.endswith(("models", "metrics")) else "POST", path, key=key)
    assert (status, found["error"]["type"]) == (401, "invalid_request_error")


def test_without_a_key_a_body_is_not_read(served):
    assert ask(served, "POST", "/v1/completions", b"{", key="")[0] == 401
    assert ask(served, "POST", "/v1/completions", b"{")[0] == 422
    address, length = served.url.removeprefix("http://"), {"Content-Length": "1000000"}
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", "/v1/completions", b"", length)  # the body does not come
    assert connection.getresponse().status == 401
    connection.close()


def numbers(served):
    """The metrics by name, their labels behind it."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    connection.request("GET", "/metrics", headers={"Authorization": "Bearer secret"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    pairs = [line.removeprefix("deepseek_jax_").rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_metrics_count_what_was_served(client, served, script):
    before = numbers(served)
    script.answer = lambda prompt: "word " * 4
    client.chat.completions.create(model="mine", messages=ASK, max_tokens=10)
    stream = client.chat.completions.create(model="mine", messages=ASK, stream=True)
    list(stream)
    after = numbers(served)

    def more(name):
        return after[name] - before.get(name, 0)

    assert more("completion_tokens_total") == 30 and more("prompt_tokens_total") == 16
    assert more("cached_prompt_tokens_total") == 16
    assert more('completions_total{reason="length"}') == 2
    assert more('http_responses_total{route="/chat/completions",status="200"}') == 2
    assert more("time_to_first_token_seconds_count") == more("time_per_output_token_seconds_count") == 2
    assert (after["alive"], after["requests_open"], after["pages"], after["pages_free"]) == (1, 0, 8, 8)
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.01
    stream = client.chat.completions.create(model="mine", messages=ASK, stream=True)
    next(iter(stream))
    assert numbers(served)["requests_open"] == 1
    stream.close()
    wait_until(lambda: numbers(served)["requests_open"] == 0)
    assert numbers(served)['completions_total{reason="unfinished"}'] >= 1
    assert ask(served, "GET", "/nothing")[0] == 404 and numbers(served)[NO_ROUTE] >= 1


NO_ROUTE = 'http_responses_total{route="none",status="404"}'


def test_unknown_routes_and_health(served):
    assert ask(served, "GET", "/v1/nothing")[0] == 404
    assert ask(served, "GET", "/health", key="") == (200, {"requests": 0})


def test_clients_that_leave_end_their_requests(client, served, script):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.01
    stream = client.chat.completions.create(model="mine", messages=ASK, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: script.is_idle and served.worker.n_open == 0)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(model="mine", messages=ASK)
    wait_until(lambda: script.is_idle and served.worker.n_open == 0)


def test_a_full_queue_refuses_and_recovers(client, served, script):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.01
    streams = [client.chat.completions.create(model="mine", messages=ASK, stream=True) for _ in range(8)]
    with pytest.raises(openai.RateLimitError, match="8 requests are running or waiting"):
        client.chat.completions.create(model="mine", messages=ASK)
    for stream in streams:
        stream.close()
    wait_until(lambda: served.worker.n_open == 0)
    assert client.chat.completions.create(model="mine", messages=ASK, max_tokens=4).choices[0].message.content == "word"


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
    made.server.should_exit = True
    made.thread.join(10)


def test_a_thought_that_fills_the_answer_is_no_content(client, script):
    script.answer = lambda prompt: "<think>\nHm, and so on" + END
    found = client.chat.completions.create(model="mine", messages=ASK, max_tokens=8).choices[0]
    assert (found.message.content, found.message.reasoning_content, found.finish_reason) == ("", "Hm, an", "length")


def test_no_request_brings_a_template(client, script):
    evil = {"chat_template": "{{ 7 * 7 }}", "chat_template_kwargs": {"thinking": True}, "documents": []}
    client.chat.completions.create(model="mine", messages=ASK, extra_body=evil)
    assert script.prompts == ["<｜begin▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜>"]


def test_long_heads_are_refused(served, client):
    place = served.url.removeprefix("http://").split(":")
    for lines in (["X: " + "y" * 10**6], [f"X-{n}: {'y' * 100}" for n in range(10_000)]):
        with socket.create_connection((place[0], int(place[1])), timeout=10) as connection:
            try:
                connection.sendall("\r\n".join(["GET /health HTTP/1.1", "Host: x", *lines, "", ""]).encode())
                answer = connection.recv(100)
            except ConnectionError:
                answer = b""
        assert b" 200 " not in answer
    assert ask(served, "GET", "/health")[0] == 200


def test_a_base_model_has_no_chat():
    made = serve(Script(), name=None)
    status, found = ask(made, "POST", "/chat/completions", {"messages": ASK})
    assert status == 400 and "it continues texts" in message_of(found)
    assert ask(made, "POST", "/completions", {"prompt": "Hello"})[1]["choices"][0]["text"] == "Hi!"
    made.server.should_exit = True
    made.thread.join(10)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": [None] * 100_000}, 422, "prompt"),
        ({"prompt": ["a"] * 100_000, "n": 16}, 400, "a request for 1600000 answers"),
        ({"prompt": []}, 400, "the prompt is an empty list"),
        (
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(100_000)), "x")},
            422,
            "100000 biases: expected at",
        ),
        ({"prompt": "a", "model": "x" * 10**6}, 400, "model 'xxx"),
    ],
)
def test_large_bodies_get_short_answers(served, body, status, message):
    found_status, found = ask(served, "POST", "/completions", body)
    assert found_status == status and message in message_of(found) and len(message_of(found)) < 1000


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
    made.server.should_exit = True
    made.thread.join(10)


def test_an_error_of_the_server_is_counted_and_its_words_are_kept_from_clients(served, monkeypatch):
    def fail(*_):
        raise OSError(2, "No such file", "/home/alice/weights")

    name = 'http_responses_total{route="/completions",status="500"}'
    before = numbers(served).get(name, 0)
    monkeypatch.setattr("deepseek_jax.serve.api.completions.text_prompt", fail)
    status, found = ask(served, "POST", "/completions", {"prompt": "a"})
    assert status == 500 and message_of(found) == "an error of the server: see its log"
    assert numbers(served)[name] == before + 1


def test_a_stop_string_at_the_last_token_is_a_stop(served, script):
    script.answer = lambda prompt: "one STOP" + END
    body = {"prompt": "a", "stop": "STOP", "max_tokens": 8}
    choice = ask(served, "POST", "/completions", body)[1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_said():
    script = Script()
    script.answer = lambda prompt: "\0"
    made = serve(script)
    status, found = ask(made, "POST", "/chat/completions", {"messages": ASK, "max_tokens": 1})
    assert status == 503 and "see the server's log" in message_of(found) and "device" not in message_of(found)
    assert ask(made, "GET", "/health")[0] == 503
    assert ask(made, "POST", "/chat/completions", {"messages": ASK})[0] == 503
    made.server.should_exit = True
    made.thread.join(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_that_comes_while_the_engine_fails_is_answered():
    script, gate = Script(), threading.Event()
    script.answer, step = (lambda prompt: "\0"), script.step
    script.step = lambda: gate.wait() and step()
    worker = Worker(script)
    worker.start()

    async def say():
        with pytest.raises(Dead):
            async with worker.open([1], Sampling(1)) as stream:
                await anext(stream)

    async def two():
        first = asyncio.create_task(say())
        while not script.requests:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(say())
        while worker._inbox.empty():
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.wait_for(asyncio.gather(first, second), 10)

    asyncio.run(two())
    worker.stop()
    assert worker.n_open == 0


def test_a_worker_that_stops_ends_what_is_open():
    script = Script()
    script.answer, script.delay_s = lambda prompt: "word " * 80, 0.01
    worker = Worker(script, 2)
    worker.start()

    async def talk():
        async with worker.open([1], Sampling(300)) as stream:
            await anext(stream)
            await asyncio.to_thread(worker.stop)
            with pytest.raises(Dead, match="stopping"):
                async for _ in stream:
                    pass

    asyncio.run(talk())
