"""deepseek-jax serve, whole: published weights on the disk, the command, OpenAI's client, SIGTERM."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest

from deepseek_jax import cli, run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.errors import UserError
from deepseek_jax.language_model import LanguageModel, load, save_pretrained
from deepseek_jax.launch import _serving, serve
from deepseek_jax.layers.base import split

ADDRESS = re.compile(r"mine at (http://\S+) ")
RUN = [sys.executable, "-P", "-m", "deepseek_jax"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny V3 in published form, with a vocabulary of bytes."""
    from tests.test_chat_verb import write_tokenizer

    config = run_config.load("tiny_v3")
    sizes = {"n_layers": 2, "d_model": 16, "dense_width": 24, "n_heads": 2, "q_rank": 12, "kv_rank": 8, "mtp_depth": 0}
    sizes |= {"nope_width": 8, "rope_width": 4, "value_width": 8, "n_experts": 4, "expert_width": 8, "top_k": 2}
    config.model.update(**sizes, vocab_size=272)
    config.data.seq_len = 64
    _, *shapes = split(abstract_module(config))
    draw = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype), shapes)
    made = tmp_path_factory.mktemp("weights") / "tiny"
    save_pretrained(LanguageModel(config, *weights), made, dtype="fp32")
    write_tokenizer(made)
    return made


@pytest.mark.slow
def test_a_served_model_says_what_it_says_here(folder):
    options = [f"--from={folder}", "--port=0", "--rows=2", "--chunk=16", "--name=mine"]
    process = subprocess.Popen([*RUN, "serve", *options], stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        address = next(found[1] for line in lines if (found := ADDRESS.search(line)))
        client = openai.OpenAI(base_url=address, api_key="any", max_retries=0)
        model = load(folder)
        ids = model.generate([256, *model.tokenizer.encode("User: Hello\n\nAssistant:")], 8)
        expected = model.tokenizer.decode([token for token in ids if token not in model.end_ids])
        ask = {"model": "mine", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}
        answers = [None] * 4

        def one(number):
            answers[number] = client.chat.completions.create(**ask).choices[0].message.content

        threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [expected.removeprefix(" ")] * 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        client.close()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_address_is_taken_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(serve, "open_service", lambda *_: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen"):
        serve.main([f"--from={folder}", f"--port={taken.getsockname()[1]}"])


BUSY = {"layers": [{"name": "moe 0", "load": [4, 1, 0, 3]}, {"name": "moe 1", "load": [0, 0, 8, 0]}]}
REDUNDANT = [
    (["--redundant-experts=2"], BUSY, "--redundant-experts=2 with --loads=nothing: expected both"),
    (["--loads={file}"], BUSY, "--redundant-experts=0 with --loads=.*: expected both"),
    (["--redundant-experts=2", "--loads={file}"], BUSY, "on one device, .* Give --expert=2"),
    (["--redundant-experts=2", "--expert=2", "--weights=fp8", "--loads={file}"], BUSY, "Give --weights=wide"),
    (["--redundant-experts=3", "--expert=2", "--loads={file}"], BUSY, "--expert=2: expected equally many .* of 2"),
    (["--redundant-experts=2", "--expert=2", "--loads={file}.absent"], BUSY, r"expected {\"layers\".*No such file"),
    (["--redundant-experts=2", "--expert=2", "--loads={file}"], [1], "expected .*curl"),
    (["--redundant-experts=2", "--expert=2", "--loads={file}"], {"layers": []}, "expected .*curl"),
    (
        ["--redundant-experts=2", "--expert=2", "--loads={file}"],
        {"layers": [{"name": "moe 0", "load": [-1]}]},
        "expected .*curl",
    ),
    (
        ["--redundant-experts=2", "--expert=2", "--loads={file}"],
        {"layers": [*BUSY["layers"], {"name": "moe 2", "load": [1]}]},
        "curl",
    ),
]


@pytest.mark.parametrize(("flags", "content", "message"), REDUNDANT)
def test_redundant_experts_without_loads_are_refused(tmp_path, flags, content, message):
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        serve.main(["--from=nowhere", "--port=0", *(flag.format(file=file) for flag in flags)])


def test_loads_are_read_by_stack(tmp_path):
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(BUSY))
    options = SimpleNamespace(redundant_experts=2, loads=str(file), data=1, expert=2, weights="wide")
    found = _serving.redundant_of(options)
    assert found.n == 2 and list(found.loads) == ["moe_blocks"]
    np.testing.assert_array_equal(found.loads["moe_blocks"], [[4, 1, 0, 3], [0, 0, 8, 0]])


def test_programs_that_do_not_compile_are_reported_in_one_line(capsys):
    def fail(stopped):
        raise RuntimeError("no memory\nlong trace")

    with _serving.compiling(SimpleNamespace(compile_largest=lambda: 3, compile=fail)):
        pass
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("compiled 3 programs")
    assert second == "some programs do not compile: no memory. Requests run in the largest ones."


def test_what_stays_is_kept_from_the_garbage_collector_when_programs_are_compiled(monkeypatch):
    said = []
    monkeypatch.setattr("gc.collect", lambda: said.append("collect"))
    monkeypatch.setattr("gc.freeze", lambda: said.append("freeze"))
    engine = SimpleNamespace(compile_largest=lambda: said.append("largest"), compile=lambda _: said.append("rest"))
    with _serving.compiling(engine, serve.keep):
        pass
    assert said == ["largest", "collect", "freeze", "rest", "collect", "freeze"]


@pytest.mark.parametrize("finds", [True, False])
def test_a_model_whose_prompts_are_never_found_says_so(monkeypatch, capsys, finds):
    """V4: what a window holds of others is in no page."""
    made = SimpleNamespace(engine=lambda *_, **__: SimpleNamespace(finds_prompts=finds))
    monkeypatch.setattr("deepseek_jax.language_model.load", lambda *_, **__: made)
    monkeypatch.setattr("deepseek_jax.compat.start_compilation_cache", lambda _: None)
    options = {"redundant_experts": 0, "loads": "", "weights": "wide", "data": 1, "expert": 1, "cache": "full"}
    options |= {"rows": 1, "pages": 0, "chunk": 16, "drafts": 0, "disk": ""}
    _serving.open_engine(SimpleNamespace(**options), "anywhere")
    assert ("prompts are never found in the cache" in capsys.readouterr().err) == (not finds)


def test_errors_are_said_before_the_weights_are_read(capsys):
    assert cli.main(["serve"]) == 2
    assert "expected --from=DIR for published weights" in capsys.readouterr().err
    message = r"cannot listen on 127.0.0.1:\d+ .*--port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=message):
        serve.bound("127.0.0.1", taken.getsockname()[1])


def test_an_address_belongs_to_one_server_before_it_listens():
    with serve.bound("127.0.0.1", 0) as first:
        with pytest.raises(UserError, match="cannot listen"):
            serve.bound(*first.getsockname())
        address = first.getsockname()
        serve.listen(first)
        with socket.create_connection(address) as client, first.accept()[0]:
            pass
        client.close()
    with serve.bound(*address) as again:  # connections of the first one still wait for their end
        serve.listen(again)
