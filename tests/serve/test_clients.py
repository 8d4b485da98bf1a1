"""OpenAI's client, LangChain, LiteLLM and lm-eval, unmodified, before a model that has learnt what it should say."""

import asyncio
import json
import os
from types import SimpleNamespace

import numpy as np
import openai
import pydantic
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.language_model import save_pretrained
from deepseek_jax.launch import evaluate
from tests.serve import twin
from tests.serve.scripted import SCHEMA, serve

pytestmark = [
    pytest.mark.slow,  # it is trained
    pytest.mark.filterwarnings("default"),  # of the clients and what they import
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The trained twin, saved as published."""
    folder = tmp_path_factory.mktemp("twin")
    made, loss = twin.train(folder)
    assert loss < 0.2
    save_pretrained(made, folder / "published", dtype="fp32")
    made.folder = folder / "published"
    return made


@pytest.fixture(scope="module")
def served(model):
    engine = model.engine(n_rows=4, chunk=32)
    options = {"tokenizer": model.tokenizer, "end_ids": model.end_ids, "n_positions": engine.most_positions, "most": 64}
    made = serve(engine, name="v31", **options)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def chat(client, messages, **options):
    return client.chat.completions.create(model="mine", messages=messages, temperature=0, **options)


def test_openai_talks(client):
    assert chat(client, twin.asked("Who are you?")).choices[0].message.content == "I am a whale of two layers."
    chunks = list(chat(client, twin.asked("Who are you?"), stream=True))
    words = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(words) == "I am a whale of two layers." and len(words) > 5
    message = chat(client, twin.asked("What is 1+1?"), reasoning_effort="high").choices[0].message
    assert (message.reasoning_content, message.content) == ("One and one make two.", "Two.")


def test_openai_calls_a_tool_and_reads_what_it_said(client):
    choice = chat(client, twin.WEATHER, tools=twin.TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    answered = [*twin.WEATHER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    assert chat(client, answered, tools=twin.TOOLS).choices[0].message.content == "It is 21 degrees in Rome."
    parts = [
        call.function.arguments
        for chunk in chat(client, twin.WEATHER, tools=twin.TOOLS, stream=True)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert json.loads("".join(parts)) == {"city": "Rome"} and len(parts) > 2
    (forced,) = chat(client, twin.WEATHER, tools=twin.TOOLS, tool_choice="required").choices[0].message.tool_calls
    assert json.loads(forced.function.arguments) == {"city": "Rome"}


def test_openai_gets_what_a_schema_describes(client):
    class Person(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        name: str
        age: int

    ada = twin.asked("Describe Ada.")
    found = client.chat.completions.parse(model="mine", messages=ada, temperature=0, response_format=Person)
    assert found.choices[0].message.parsed == Person(name="Ada", age=36)
    song = chat(client, twin.asked("Who are you?"), response_format=SCHEMA(twin.PERSON), max_tokens=60)
    if song.choices[0].finish_reason == "stop":  # what it learnt to say is not JSON
        assert set(json.loads(song.choices[0].message.content)) == {"name", "age"}


def test_openai_continues_and_fills_texts(client):
    begun = twin.SONG[:15]
    whole = client.completions.create(model="mine", prompt=begun, temperature=0, logprobs=1).choices[0]
    assert (begun + whole.text, whole.finish_reason) == (twin.SONG, "stop")
    assert min(whole.logprobs.token_logprobs) > -0.7  # it knows the song by heart
    before, middle, after = twin.GAP
    assert client.completions.create(model="mine", prompt=before, suffix=after, temperature=0).choices[0].text == middle


def test_langchain(served):
    chains = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    options = {"base_url": served.url + "/v1", "api_key": "any", "model": "mine", "temperature": 0, "max_retries": 0}
    talk = chains.ChatOpenAI(**options)
    assert talk.invoke("Who are you?").content == "I am a whale of two layers."
    chunks = [chunk.content for chunk in talk.stream("Who are you?")]
    assert "".join(chunks) == "I am a whale of two layers." and len(chunks) > 5
    assert asyncio.run(talk.ainvoke("Who are you?")).content == "I am a whale of two layers."
    with_tools = talk.bind_tools(twin.TOOLS)
    called = with_tools.invoke(twin.WEATHER[0]["content"])
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", {"city": "Rome"})]
    result = {"role": "tool", "content": "21", "tool_call_id": called.tool_calls[0]["id"]}
    assert with_tools.invoke([*twin.WEATHER, called, result]).content == "It is 21 degrees in Rome."
    schema = twin.PERSON | {"title": "person", "description": "A person"}
    person = talk.with_structured_output(schema, method="json_schema")
    assert person.invoke("Describe Ada.") == {"name": "Ada", "age": 36}
    text = chains.OpenAI(**options)
    assert twin.SONG[:15] + text.invoke(twin.SONG[:15]) == twin.SONG


def test_litellm(served, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    for provider in ("openai", "deepseek"):
        options = {"model": f"{provider}/mine", "api_base": served.url + "/v1", "api_key": "any", "temperature": 0}
        found = litellm.completion(messages=twin.asked("Who are you?"), **options)
        assert found.choices[0].message.content == "I am a whale of two layers."
        chunks = list(litellm.completion(messages=twin.asked("Who are you?"), stream=True, **options))
        words = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(words) == "I am a whale of two layers."
        (call,) = litellm.completion(messages=twin.WEATHER, tools=twin.TOOLS, **options).choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    options["model"] = "text-completion-openai/mine"
    found = litellm.text_completion(prompt=twin.SONG[:15], max_tokens=30, **options)
    assert twin.SONG[:15] + found.choices[0].text == twin.SONG


def instances(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def scores(model, context, text):
    """The log-probability of a text by the forward pass, and whether each of its tokens is the likeliest."""
    begun, ids = model.prompt(context), model.prompt(context + text)
    logits_TV = np.asarray(model([ids])[0], np.float64)
    logits_TV -= np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    places = range(len(begun), len(ids))
    return sum(logits_TV[p - 1, ids[p]] for p in places), all(logits_TV[p - 1].argmax() == ids[p] for p in places)


@pytest.fixture(scope="module")
def judges(model, served):
    """lm-eval's ways to ask: the engine itself, and the server."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra evaluate)")
    from deepseek_jax.launch import _lm_eval

    engine = model.engine(n_rows=4, chunk=32)
    return _lm_eval.InProcess(engine, model.tokenizer, model.end_ids), _lm_eval.over_http(served.url, "", 4)


def test_lm_eval_gets_the_scores_of_the_forward_pass(model, judges):
    asked = [(question, f" {answer}") for question in twin.QUESTIONS for answer in twin.QUESTIONS.values()]
    asked.append((twin.SONG[:15], twin.SONG[15:]))
    expected = [scores(model, *one) for one in asked]
    assert [is_greedy for _, is_greedy in expected] == [n % 5 == 0 for n in range(16)] + [True]
    for judge in judges:
        found = judge.loglikelihood(instances(*asked), disable_tqdm=True)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
        np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-4)


def test_lm_eval_scores_whole_texts_that_are_longer_than_the_model(model, judges):
    long = " ".join([twin.SONG] * 20)
    assert len(model.tokenizer.encode(long)) > model.n_positions
    texts = instances((twin.SONG,), (long,))
    found = [judge.loglikelihood_rolling(texts, disable_tqdm=True) for judge in judges]
    assert found[0][0] == pytest.approx(scores(model, "", twin.SONG)[0], abs=1e-3)
    assert found[0][1] < found[0][0]
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-3)
    with pytest.raises(UserError, match="to be scored: expected fewer than 207"):
        judges[0].loglikelihood(instances(("", long)), disable_tqdm=True)


def test_lm_eval_lets_texts_be_continued(judges):
    rest = twin.SONG[15:]
    asked = [(twin.SONG[:15], {"until": ["ice"], "max_gen_toks": 40}), (twin.SONG[:15], {"max_gen_toks": 40})]
    asked += [(question, {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}) for question in twin.QUESTIONS]
    for judge in judges:
        found = judge.generate_until(instances(*asked), disable_tqdm=True)
        assert found == [rest.partition("ice")[0], rest, *(f" {answer}" for answer in twin.QUESTIONS.values())]


def test_a_prompt_that_is_too_long_loses_its_beginning(judges):
    engine, asked = judges[0].engine, []
    submit = engine.submit
    engine.submit = lambda prompt, sampling: (
        asked.append((len(prompt), sampling.max_new_tokens)) or submit(prompt, sampling)
    )
    long = " ".join([twin.SONG] * 20)
    judges[0].generate_until(
        instances((long, {"max_gen_toks": 3}), (long, {"max_gen_toks": 999}), ("The", {})), disable_tqdm=True
    )
    engine.submit = submit
    assert asked == [(205, 3), (104, 104), (2, 206)]


COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = """
task: choose
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""
CONTINUE = """
task: continue
output_type: generate_until
doc_to_target: " {{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.parametrize("place", ["in this process", "over HTTP"])
def test_the_verb_evaluate_counts_right_answers(model, served, tmp_path, monkeypatch, capsys, place):
    """The key of one question of four is wrong."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra evaluate)")
    datasets = pytest.importorskip("datasets", reason="lm-eval is not installed (extra evaluate)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    choices = list(twin.QUESTIONS.values())
    rows = [{"question": question, "choices": choices, "label": n} for n, question in enumerate(twin.QUESTIONS)]
    rows[2]["label"] = 0
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = COMMON.format(file=tmp_path / "questions.jsonl")
    (tmp_path / "choose.yaml").write_text(CHOOSE + common)
    (tmp_path / "continue.yaml").write_text(CONTINUE + common)
    where = f"--from={model.folder}" if place == "in this process" else f"--url={served.url}"
    out = tmp_path / "out.json"
    words = [where, "--tasks=choose,continue", f"--tasks-dir={tmp_path}", f"--out={out}", "--rows=1", "--chunk=16"]
    assert evaluate.main(words) == 0
    found = json.loads(out.read_text())
    assert (found["choose"]["acc,none"], found["continue"]["exact_match,none"]) == (0.75, 0.75)
    assert "|choose" in capsys.readouterr().out
    assert os.listdir(tmp_path / "cache")
