"""`deepseek-jax rl` from its command line: a base first, resuming, evaluation of what it made, settings refused."""

import json
from types import SimpleNamespace

import pytest

from deepseek_jax import run_config
from deepseek_jax.abstract_model import with_routes
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE


@pytest.mark.slow
def test_the_verb_trains_a_base_and_improves_it(tmp_path, monkeypatch, capsys):
    """With a base of a few steps: it can do nothing, and the run says so; a second call has nothing left to do."""
    from deepseek_jax.launch import _sums_base, rl

    config = tmp_path / "nano.py"
    config.write_text(
        "from deepseek_jax.configs import tiny_zero\n"
        "def get_config():\n"
        "    c = tiny_zero.get_config()\n"
        "    c.model.d_model = c.model.expert_width = 16\n"
        "    c.model.n_layers, c.model.n_dense_layers = 1, 0\n"
        "    c.rl.eval_problems, c.loop.steps, c.loop.eval_every = 128, 3, 3\n"
        "    return c\n"
    )
    base = tmp_path / "nano_base.py"
    base.write_text(
        "from deepseek_jax.configs import tiny_sums\n"
        "def get_config():\n"
        "    c = tiny_sums.get_config()\n"
        "    c.loop.steps = 3\n"
        "    return c\n"
    )
    monkeypatch.setattr(_sums_base, "BASE", str(base))
    monkeypatch.setattr(_sums_base, "BASE_TEXT", 500)
    words = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=1"]
    assert rl.main(words) == 0
    printed = capsys.readouterr().out
    assert "first a base model" in printed and "step 3/3  held-out" in printed
    assert "no more than by chance" in printed and "checkpoint of step 3" in printed
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["messages"][0]["role"] == "user"
    assert rl.main(words) == 0
    assert "This run has reached step 3" in capsys.readouterr().out
    student = [words[0], f"--workdir={tmp_path / 'student'}", "--config.mesh.data=1"]
    student += [f"--config.run.init_from={tmp_path / 'run' / 'base'}", f"--config.rl.teacher={tmp_path / 'run'}"]
    assert rl.main(student) == 0
    printed = capsys.readouterr().out
    assert f"judged by {tmp_path / 'run'}" in printed and "teacher_kl=" in printed
    assert rl.main([word for word in student if "init_from" not in word]) == 0  # a run that has begun needs no base
    assert "This run has reached step 3" in capsys.readouterr().out and not (tmp_path / "student" / "base").exists()
    (tmp_path / "run").rename(tmp_path / "moved")  # with its own base
    assert rl.main([words[0], f"--workdir={tmp_path / 'moved'}", words[2]]) == 0
    assert "This run has reached step 3" in capsys.readouterr().out
    (tmp_path / "moved").rename(tmp_path / "run")
    assert rl.main([*words, "--config.loop.steps=4"]) == 0
    printed = capsys.readouterr().out
    assert "resuming from step 3" in printed and "no more than by chance" in printed
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert steps == [0] * 8 + [3] * 8 + [4] * 8
    with pytest.raises(UserError, match=r"holds a run of other settings: config.rl.questions: 16 -> 8"):
        rl.main([*words, "--config.rl.questions=8"])
    with pytest.raises(UserError, match=r"holds a run without a reference \(config.rl.grpo.beta: 0 -> 0.1\)"):
        rl.main([*words, "--config.rl.grpo.beta=0.1"])
    answers_are_counted(tmp_path, capsys)


def answers_are_counted(tmp_path, capsys):
    """`evaluate` draws what its file of answers does not hold yet."""
    from deepseek_jax.launch import evaluate

    words = [f"--workdir={tmp_path / 'run'}", "--problems=sums", "--limit=5", "--rows=8", "--temperature=1"]
    words += [f"--answers={tmp_path / 'answers'}", f"--out={tmp_path / 'out.json'}"]
    assert evaluate.main([*words, "--samples=1"]) == 0
    first = (tmp_path / "answers").read_text().splitlines()
    assert "10 of 10 answers" in capsys.readouterr().err
    assert evaluate.main([*words, "--samples=2"]) == 0
    printed = capsys.readouterr()
    assert "10 of 15 answers are there already" in printed.err and "maj@2" in printed.out
    assert (tmp_path / "answers").read_text().splitlines()[: len(first)] == first and len(first) == 11
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["pass@1"]["problems"] == 5 and 0 <= found["cut_off"] <= 1 and found["max_tokens"] == 16
    with pytest.raises(UserError, match=r"holds something else than answers of"):
        evaluate.main([*words, "--samples=2", "--seed=1"])
    with pytest.raises(UserError, match=r"--max-tokens=60: the model has 60 positions"):
        evaluate.main([*words, "--max-tokens=60"])


def check_teacher(config, monkeypatch, capsys):
    from deepseek_jax import weights
    from deepseek_jax.launch import _reinforcement

    other = config.copy_and_resolve_references()
    other.model.vocab_size //= 2
    source = SimpleNamespace(tokenizer="none", config=other)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Give a teacher with the student's tokenizer"):
        patch.setattr(weights, "open_weights", lambda name: source)
        _reinforcement.open_teacher(config, None)
    assert "brings no tokenizer; that its ids are those of" in capsys.readouterr().out


def test_the_verb_checks_its_settings(tmp_path, monkeypatch, capsys):
    from deepseek_jax.launch import _reinforcement, _sums_base, rl

    workdir = f"--workdir={tmp_path / 'run'}"
    with pytest.raises(UserError, match=r"needs a model that can solve some of them. Name a run"):
        rl.main([workdir, "--config.rl.problems=rg:leg_counting"])
    config = run_config.load("tiny_zero")
    monkeypatch.setattr(_sums_base, "BASE_TEXT", 2)
    assert _sums_base.write_text(config, tmp_path / "text.jsonl") == _sums_base.write_text(
        config, tmp_path / "text.jsonl"
    )
    config.seed += 1
    with pytest.raises(UserError, match=r"holds a base that has read about other problems.*sums:6 0.1, seed 0"):
        _sums_base.write_text(config, tmp_path / "text.jsonl")
    config.rl.updates = 3
    with pytest.raises(UserError, match=r"16 questions x 8 answers do not divide into 3 updates on 2 devices"):
        _reinforcement.check_rows(config, 2)
    config.loss.trained = "indexer"
    with pytest.raises(UserError, match=r"config.loss.trained='indexer': reinforcement learning trains all weights"):
        _reinforcement.check_sizes(config)
    config.loss.trained, config.ema.decay = "", 0.9
    with pytest.raises(UserError, match=r"config.ema.decay=0.9: reinforcement learning keeps no average"):
        _reinforcement.check_sizes(config)
    config.mesh.pipe = 2
    with pytest.raises(UserError, match=r"config.mesh.pipe=2: answers are drawn on whole models"):
        _reinforcement.check_sizes(config)
    config = run_config.load("tiny_zero")
    config.rl.rows_at_once = 48
    with pytest.raises(UserError, match=r"rows_at_once=48: expected a number that divides 16 questions x 8 answers"):
        _reinforcement.check_rows(config, 2)
    config.rl.rollout = "engine"
    with pytest.raises(UserError, match=r"rl.rollout=engine on 2 devices: expected one. Set config.mesh.data=1"):
        _reinforcement.check_engine(config, 2)
    config.rl.temperature = 0.5
    with pytest.raises(UserError, match=r"rl.temperature=0.5 with config.rl.rollout=engine: expected 1.0"):
        _reinforcement.check_engine(config, 1)
    config.rl.keep_routing, config.loss.balance_rate = True, 1e-3
    with pytest.raises(UserError, match=r"router biases would follow choices that are not the routers' own"):
        _reinforcement.check_sizes(config)
    check_teacher(config, monkeypatch, capsys)
    config = run_config.load("tiny_v1")
    config.rl.keep_routing = True
    with pytest.raises(UserError, match=r"rl.keep_routing=True: the model of tiny_v1 has no routed experts"):
        _reinforcement.check_sizes(config)
    config = run_config.load("tiny_v4")
    config.rl = run_config.load("tiny_zero").rl
    config.rl.keep_routing = True
    with pytest.raises(
        UserError, match=r"keep_routing=True: different blocks of tiny_v4 run as one \(blocks_1\), which"
    ):
        _reinforcement.check_sizes(config)
    with pytest.raises(UserError, match=r"routes=True: different blocks of tiny_v4 run as one .*Leave routes=False"):
        with_routes(config, SINGLE_DEVICE)
