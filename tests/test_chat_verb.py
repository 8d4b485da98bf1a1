"""deepseek-jax chat: at a terminal and in a pipe, with a scripted model; once with a network of its own."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from deepseek_jax import cli, run_config
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.language_model import LanguageModel, abstract_module, load, save_pretrained
from deepseek_jax.launch import _talking, chat
from deepseek_jax.layers.base import split

BYTES = open_tokenizer("bytes")
END = "<｜end▁of▁sentence｜>"


@pytest.fixture
def scripted(monkeypatch):
    """A model that says given lines; returns the function that gives them, and keeps the prompts it was shown."""

    def say(*lines, n_positions=1000, **data):
        lines, prompts = list(lines), []

        def stream(ids, max_new_tokens, stop_ids, **draw):
            prompts.append(BYTES.decode(ids, specials=True))
            return iter(BYTES.encode(lines.pop(0), specials=True).tolist()[:max_new_tokens])

        config = run_config.load("tiny_v3")
        config.data.update(data)
        model = types.SimpleNamespace(
            config=config, tokenizer=BYTES, stream=stream, n_positions=n_positions, end_ids=(257,)
        )
        monkeypatch.setattr("deepseek_jax.language_model.load", lambda source: model)
        monkeypatch.setattr("deepseek_jax.compat.start_compilation_cache", lambda folder: None)
        return prompts

    return say


DRAWINGS = [
    (None, {"temperature": 0.6, "top_p": 0.95}),
    ({"temperature": 1.0, "top_p": 0.9, "do_sample": True}, {"temperature": 1.0, "top_p": 0.9}),
    ({"top_p": 1}, {"temperature": 0.6, "top_p": 1.0}),
    ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0, "top_p": 0.95}),
    ({"temperature": "warm", "top_p": None}, {"temperature": 0.6, "top_p": 0.95}),
]


@pytest.mark.parametrize(("said", "drawing"), DRAWINGS)
def test_a_model_draws_as_its_own_files_say(tmp_path, said, drawing):
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    config = run_config.load("tiny_v3")
    config.release.folder = str(tmp_path)
    assert _talking.drawing_of(config) == drawing


def piped(monkeypatch, text, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return chat.main(["--from=mine", "--template=r1", *flags])


def test_one_message_per_line_and_answers_on_standard_output(scripted, monkeypatch, capsys):
    prompts = scripted("<think>\nHm\n</think>\n\nHi!" + END, "Two." + END)
    assert piped(monkeypatch, "Hello\n\n1+1=?\n", "--system=Be brief.") == 0
    out, err = capsys.readouterr()
    assert out == "Hi!\nTwo.\n"
    assert err.strip() == "Hm"  # the thought
    assert prompts[1] == (
        f"<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜>Hi!{END}<｜User｜>1+1=?<｜Assistant｜>"
    )


def test_commands(scripted, monkeypatch, capsys, tmp_path):
    prompts = scripted("Hi!" + END, "Hello again!" + END)
    file = tmp_path / "talk.jsonl"
    text = f'Hello\n/save {file}\n/reset\n"""two\n\nlines"""\n/usr is a folder\n/help\n/quit\nunread\n'
    scripted("Hi!" + END, "Two." + END, "So it is." + END)
    assert piped(monkeypatch, text) == 0
    out, err = capsys.readouterr()
    assert out == "Hi!\nTwo.\nSo it is.\n"
    assert "(a new conversation)" in err and "/save FILE" in err and "begins and ends a message" in err
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    }
    assert prompts == []


@pytest.mark.parametrize("argument", ["", " /proc/nowhere/x", " {exists}"])
def test_what_cannot_be_saved_is_said(scripted, monkeypatch, tmp_path, argument):
    (tmp_path / "exists").write_text("")
    scripted()
    with pytest.raises(UserError, match=r"expected the name of a file|cannot be written|exists\. Give another name"):
        piped(monkeypatch, "/save" + argument.format(exists=tmp_path / "exists"))


def test_several_lines_are_one_message(scripted, monkeypatch):
    prompts = scripted(*[END] * 3)
    piped(monkeypatch, '"""one\ntwo"""\n"""\nthree\n  four\n"""\n"""five"""\n')
    talks = [re.split("<｜User｜>|<｜Assistant｜>", prompt)[-2] for prompt in prompts]
    assert talks == ["one\ntwo", "three\n  four", "five"]


def test_ctrl_c_at_the_prompt_does_not_leave_and_ctrl_d_does(monkeypatch, capsys):
    keys = iter([KeyboardInterrupt, "Hello", EOFError])

    def type_next(prompt):
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    terminal = chat.Terminal(5)
    terminal.is_interactive = True
    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(chat, "_is_waiting", lambda: False)
    assert list(terminal.messages()) == ["Hello"]
    assert "(/quit or Ctrl-D leaves)" in capsys.readouterr().err
    keys = iter(["one", "two", EOFError])  # pasted, and then the end
    waiting = iter([True, True])
    monkeypatch.setattr(chat, "_is_waiting", lambda: next(waiting))
    assert list(terminal.messages()) == ["one\ntwo"]


def test_limits_are_said(scripted, monkeypatch, capsys):
    scripted("x" * 90)
    piped(monkeypatch, "Hello\n", "--max-tokens=5")
    out, err = capsys.readouterr()
    assert (out, err) == ("xxxxx\n", "(stopped after 5 tokens: --max-tokens allows more)\n")
    scripted("x" * 90, n_positions=40)
    with pytest.raises(UserError, match=r"expected fewer than 40. Start a new one \(/reset\)"):
        piped(monkeypatch, "Hello\nmore\n")
    out, err = capsys.readouterr()
    assert out == "x" * 32 + "\n"
    assert "(the conversation has the 40 tokens that the model takes: /reset)" in err


def test_a_model_without_a_template_is_asked_about(scripted, monkeypatch):
    scripted()
    with pytest.raises(
        UserError, match="mine has no chat template .*continues text: deepseek-jax generate --workdir=mine"
    ):
        chat.main(["--from=mine"])
    with pytest.raises(UserError, match="mine came without a tokenizer.json"):
        _talking.template_name("none", "mine", "v3")
    with pytest.raises(UserError, match="'r2': expected one of v1"):
        chat.main(["--from=mine", "--template=r2"])
    for flags in ([], ["--from=a", "--workdir=b"]):
        with pytest.raises(UserError, match="expected --from=DIR for published weights, or --workdir=RUN"):
            chat.main(flags)


def test_a_run_on_conversations_knows_its_template(scripted, monkeypatch):
    prompts = scripted("Hi!" + END, chat_template="v2")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert chat.main(["--workdir=run"]) == 0
    assert prompts == ["<｜begin▁of▁sentence｜>User: Hello\n\nAssistant:"]


@pytest.mark.parametrize("where", ["folder", "file"])
def test_the_template_beside_the_tokenizer_is_the_models(tmp_path, where):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{'<｜User｜>'}}{{'<｜Assistant｜></think>'}}{% if thinking %}")
    tokenizer = str(tmp_path if where == "folder" else tmp_path / "tokenizer.json")
    assert _talking.template_name(tokenizer, "mine", "") == "v31"
    assert _talking.template_name(tokenizer, "mine", "r1-0528") == "r1"


def test_a_template_that_only_the_kind_of_model_names_is_told(capsys):
    config = run_config.load("tiny_v3")
    config.data.update(tokenizer="bytes", chat_template="v32")
    assert _talking.template_of(config, "mine", "") == "v32"
    assert capsys.readouterr().err == "chat template: v32, by model_type; --template changes it\n"
    assert _talking.template_of(config, "mine", "r1") == "r1"
    config.data.format = "conversations"
    assert _talking.template_of(config, "mine", "") == "v32" and capsys.readouterr().err == ""


# A process with a scripted model, which says "Hm" in thought and the message back, or counts slowly.
ECHO = """
import sys, time, types
from deepseek_jax.data.tokenizer import open_tokenizer

BYTES = open_tokenizer("bytes")

def stream(ids, max_new_tokens, stop_ids, **draw):
    text = BYTES.decode(ids, specials=True).split("<｜User｜>")[-1].split("<｜Assistant｜>")[0]
    said = "1 2 3 4 5 6 7 8 9" if text == "count" else "<think>\\nHm\\n</think>\\n\\n" + repr(text)
    for token in BYTES.encode(said + "<｜end▁of▁sentence｜>", specials=True).tolist():
        time.sleep(0.5 if text == "count" else 0)
        yield token

from deepseek_jax import run_config

config = run_config.load("tiny_v3")
model = types.SimpleNamespace(config=config, tokenizer=BYTES, stream=stream, n_positions=1000, end_ids=(257,))
for name, offers in (("language_model", "load"), ("compat", "start_compilation_cache")):  # without jax: starts at once
    sys.modules["deepseek_jax." + name] = types.SimpleNamespace(**{offers: lambda argument: model})

from deepseek_jax.launch import _talking, chat
sys.exit(chat.main(["--from=mine", "--template=r1"]))
"""


class Seat:
    """Somebody at a terminal."""

    def __init__(self, *command):
        self.terminal, far_end = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        env.pop("NO_COLOR", None)
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), far_end)
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
        os.close(far_end)
        self.seen = ""

    def wait_for(self, text, seconds=60):
        """Reads until the text appears; returns all up to its end."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace").replace("\r", "")
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def type(self, text):
        os.write(self.terminal, text.encode())

    def leave(self):
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture
def seat():
    seat = Seat(sys.executable, "-c", ECHO)
    yield seat
    seat.leave()


def test_at_a_terminal(seat):
    assert "mine, template r1, 1,000 tokens at most. /help for help." in seat.wait_for("> ")
    seat.type("Hello\n")
    answer = seat.wait_for("'Hello'")
    assert "\x1b[2mHm\x1b[22m\n\n'Hello'" in answer  # the thought dim, and apart
    seat.wait_for("> ")
    seat.type("one\ntwo\n")  # pasted
    seat.wait_for("'one\\ntwo'")
    seat.wait_for("> ")
    seat.type("/what\n")
    seat.wait_for("/what: no such command. Commands: /help, /reset, /save, /quit.")
    seat.wait_for("> ")
    seat.type("/save\n")
    seat.wait_for("expected the name of a file")  # and the conversation continues
    seat.wait_for("> ")
    seat.type("count\n")
    seat.wait_for("1 2")
    seat.process.send_signal(signal.SIGINT)  # Ctrl-C
    seat.wait_for("(stopped)")
    seat.wait_for("> ")
    seat.type("\x04")  # Ctrl-D
    assert seat.process.wait(timeout=60) == 0


def test_a_network_of_its_own(tmp_path, monkeypatch, capsys):
    """From a directory of published weights, with tokenizer and template beside them."""
    config = run_config.load("tiny_v1")
    config.model.update(n_layers=1, d_model=16, dense_width=16, n_heads=2, head_width=8, n_kv_heads=2, vocab_size=272)
    config.data.seq_len = 32
    _, *shapes = split(abstract_module(config))
    draw = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: jax.device_put(np.asarray(draw.normal(size=x.shape), x.dtype)), shapes)
    save_pretrained(LanguageModel(config, *weights), tmp_path / "tiny", dtype="fp32")
    write_tokenizer(tmp_path / "tiny")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert cli.main(["chat", f"--from={tmp_path / 'tiny'}", "--max-tokens=6", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    model = load(tmp_path / "tiny")
    ids = model.generate([256, *model.tokenizer.encode("User: Hello\n\nAssistant:")], 6)
    assert out.rstrip("\n") == model.tokenizer.decode(ids).strip()
    assert err.endswith("(stopped after 6 tokens: --max-tokens allows more)\n")


def write_tokenizer(folder):
    """Bytes, begin and end, and the template of V1."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    engine = Tokenizer(models.BPE(vocab=letters, merges=[]))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(mark, special=True) for mark in ("<｜begin▁of▁sentence｜>", END)])
    engine.save(str(folder / "tokenizer.json"))
    template = "{{ 'User: ' + message['content'] }}{{ 'Assistant: ' + message['content'] }}{{ 'Assistant:' }}"
    settings = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
