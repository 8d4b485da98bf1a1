"""The server before a real engine: log-probabilities, echo, ids and filters are those of the model."""

import json

import jax
import numpy as np
import openai
import pytest

from tests.serve.scripted import BYTES, SCHEMA, ask, serve, wait_until

pytestmark = pytest.mark.slow  # compiles an engine

PROMPT = [72, 101, 108, 200, 7]


@pytest.fixture(scope="module")
def running(engine):
    return engine(96, n_pages=49, n_steps=8)


@pytest.fixture(scope="module")
def served(running):
    made = serve(running, n_positions=96, most=64)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def log_softmax(logits):
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def complete(client, **options):
    return client.completions.create(model="mine", temperature=0, **options).choices


def test_log_probabilities_of_prompt_and_answer_are_those_of_the_forward_pass(client, network):
    options = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 3, "echo": True, "extra_body": {"return_token_ids": True}}
    (choice,) = complete(client, **options)
    ids, found = [*choice.prompt_token_ids, *choice.token_ids[len(PROMPT) :]], choice.logprobs
    assert choice.token_ids[: len(PROMPT)] == PROMPT == choice.prompt_token_ids and len(ids) == len(PROMPT) + 4
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for place in range(1, len(ids)):
        expected = log_softmax(network.last_logits(ids[:place]))
        assert found.token_logprobs[place] == pytest.approx(expected[ids[place]], abs=1e-5)
        top = sorted(found.top_logprobs[place].values(), reverse=True)
        assert top[:3] == pytest.approx(np.sort(expected)[:-4:-1], abs=1e-5)
        assert 3 <= len(top) <= 4
        if place >= len(PROMPT):
            assert found.token_logprobs[place] == top[0] and ids[place] == expected.argmax()
    assert choice.text.startswith(BYTES.decode(PROMPT))


def test_the_prompt_alone_can_be_scored_and_a_cache_changes_nothing(client):
    text = "A text of several pages: they stay in memory."
    found = [complete(client, prompt=text, max_tokens=0, logprobs=1, echo=True)[0] for _ in range(2)]
    assert found[0] == found[1]
    assert (found[0].text, found[0].finish_reason) == (text, "length")
    assert found[0].logprobs.tokens == list(text) and found[0].logprobs.text_offset == list(range(len(text)))
    complete(client, prompt=text, max_tokens=2)
    assert complete(client, prompt=text, max_tokens=0, logprobs=1, echo=True) == found[:1]
    filtered = complete(client, prompt=text, max_tokens=0, logprobs=1, echo=True, extra_body={"top_k": 1})
    assert filtered == found[:1]  # scores are of the model's own distribution
    scored, drawn = complete(client, prompt=[text, "Another."], max_tokens=1, logprobs=1, echo=True)
    assert scored.logprobs.token_logprobs[:-1] == pytest.approx(found[0].logprobs.token_logprobs[:], nan_ok=True)
    assert len(drawn.logprobs.tokens) == 9


def test_many_long_prompts_with_log_probabilities_take_little_memory(client, served, network, monkeypatch):
    """On the device lie the scores of what is in flight, and never the logits of a whole prompt."""
    engine, taken = served.worker.engine, []
    step = engine.step

    def measured():
        outputs = step()
        taken.append(sum(array.nbytes for array in jax.live_arrays()))
        return outputs

    prompts = np.random.default_rng(0).integers(0, 200, (12, 90)).tolist()
    before = sum(array.nbytes for array in jax.live_arrays())
    monkeypatch.setattr(engine, "step", measured)
    choices = complete(client, prompt=prompts, max_tokens=1, logprobs=5, echo=True)
    assert [len(choice.logprobs.tokens) for choice in choices] == [91] * 12
    assert len(taken) > 12 and max(taken) - before < 90 * network.vocab_size * 4


def test_more_likeliest_tokens_than_there_are_is_said(served, client, network, monkeypatch):
    monkeypatch.setattr(served.worker.engine, "vocab_size", 3)
    status, found = ask(served, "POST", "/completions", {"prompt": [1], "max_tokens": 1, "logprobs": 5})
    assert status == 400 and "logprobs=5: expected 3 or less, the size of the vocabulary" in found["error"]["message"]
    monkeypatch.undo()
    assert complete(client, prompt=PROMPT, max_tokens=1)


def test_streamed_log_probabilities_are_the_whole_ones(client):
    ask = {"model": "mine", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5, "seed": 1}
    ask |= {"max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**ask)
    (whole,) = answer.choices
    entries = []
    for chunk in client.chat.completions.create(**ask, stream=True):
        entries += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert entries == whole.logprobs.content and len(entries) == answer.usage.completion_tokens > 4
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_filters_and_biases_reach_the_engine(client):
    free = complete(client, prompt=PROMPT, max_tokens=8, extra_body={"return_token_ids": True})[0].token_ids
    options = {"prompt": PROMPT, "max_tokens": 8, "seed": 3, "extra_body": {"return_token_ids": True, "top_k": 1}}
    found = client.completions.create(model="mine", temperature=2, **options).choices[0].token_ids
    assert found == free
    (biased,) = complete(client, prompt=PROMPT, max_tokens=4, logit_bias={"65": 100})
    assert biased.text == "AAAA"
    # biases further apart than the model's own logits, and as far as a token that came three times is penalised
    both = {"prompt": PROMPT, "max_tokens": 8, "logit_bias": {"65": 54, "66": 50}}
    assert complete(client, **both)[0].text == "A" * 8
    penalised = complete(client, **both, frequency_penalty=2)[0].text
    assert penalised[0] == "A" and set(penalised) == {"A", "B"}


def test_json_from_a_model_of_noise(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    schema["additionalProperties"] = False
    ask = {"model": "mine", "messages": [{"role": "user", "content": "?"}], "response_format": SCHEMA(schema), "n": 3}
    ask["extra_body"] = {"logit_bias": {str(i): -100 for i in (10, 32, 264)}}  # no blanks, no thought
    for choice in client.chat.completions.create(temperature=1.5, seed=1, **ask).choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content)) == {"a", "b"}


def test_the_server_survives_weights_that_are_not_numbers(client, running, network):
    running.replace_weights(jax.tree.map(lambda w: w * np.nan, network.weights))
    found = complete(client, prompt=[1, 2, 3], max_tokens=2, logprobs=2, echo=True)[0]
    assert found.logprobs.token_logprobs[1:] == [-9999.0] * 4
    running.replace_weights(network.weights)


def test_the_loads_of_experts_are_those_of_the_latest_answers(served, client, network):
    complete(client, prompt=PROMPT, max_tokens=1)  # before any request there are none
    ask(served, "GET", "/experts")
    before = ask(served, "GET", "/experts")[1]["layers"]
    assert ask(served, "GET", "/experts")[1]["layers"] == before
    complete(client, prompt=PROMPT, max_tokens=4)
    after = ask(served, "GET", "/experts")[1]["layers"]
    c = network.config.model
    assert [layer["name"] for layer in after] == ["moe 0", "moe 1"]
    for old, new in zip(before, after, strict=True):
        assert sum(new["load"]) - sum(old["load"]) == 9 * c.top_k and len(new["load"]) == c.n_experts
        assert max(new["load"]) - max(old["load"]) <= 9


def test_what_the_engine_refuses_is_said(served):
    wait_until(lambda: served.worker.n_open == 0)
    status, found = ask(served, "POST", "/completions", {"prompt": [1], "logit_bias": {"9999": 1}})
    assert status == 400 and "logit_bias" in found["error"]["message"]
    status, found = ask(served, "POST", "/completions", {"prompt": [1], "max_tokens": 0})
    assert status == 400 and "max_tokens=0" in found["error"]["message"]
    status, found = ask(served, "POST", "/completions", {"prompt": [1], "best_of": 3})
    assert status == 400 and "best_of=3" in found["error"]["message"]
    pages = served.worker.engine.ranks[0].pages
    assert served.worker.is_alive and pages.n_free == pages.n_pages - 1
