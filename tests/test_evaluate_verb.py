"""What deepseek-jax evaluate says where something is missing; its figures are tested beside the server's clients."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax import cli, run_config
from deepseek_jax.data.pipeline import open_splits
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _evaluation
from deepseek_jax.rl.problems import Problem, divided, listed, open_problems
from deepseek_jax.rl.rejection import conversation
from deepseek_jax.rl.rewards import Response


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from=x"], "expected --tasks=NAME"),
        (["--from=x", "--tasks=piqa", "--problems=sums"], "--problems=SOURCE or --by-position: one of them"),
        (["--from=x", "--by-position", "--problems=sums"], "or --by-position: one of them"),
        (["--from=x", "--tasks=piqa", "--length=9"], "--text and --length are of --by-position"),
        (["--problems=sums"], "expected --from=DIR for published weights"),
        (["--url=x", "--problems=sums"], "--url beside --problems: expected --from=DIR or --workdir=RUN"),
        (["--from=x", "--tasks=piqa", "--url=y"], "--url beside --from or --workdir"),
        (["--tasks=piqa"], "expected --from=DIR for published weights"),
    ],
)
def test_what_is_missing_is_said(capsys, words, message):
    assert cli.main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """Returns a function that asks the problems of a list, of a run with some settings."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"{n} + 1", "answer": str(n + 1)}) + "\n" for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(rows))
    (tmp_path / "part.jsonl").write_text("".join(rows[:20]) + json.dumps({"prompt": "new", "answer": "1"}))

    def ask(source, problems="sums", data="stdlib", fingerprint="", workdir="run"):
        config = run_config.load("tiny_zero")
        config.rl.problems, config.data.source = problems, data
        monkeypatch.setattr(_evaluation, "fingerprint_of", lambda workdir: fingerprint)
        options = SimpleNamespace(problems=source, workdir=workdir, limit=0)
        return [
            problem.messages[0]["content"] for problem in _evaluation.asked(options, SimpleNamespace(config=config))[0]
        ]

    return ask


def test_no_problem_that_a_run_was_trained_on_is_asked_however_the_list_is_spelled(lists, tmp_path, capsys):
    training, held = divided(listed("mine.jsonl")[0], run_config.load("tiny_zero").rl.holdout_rate)
    new = {problem.messages[0]["content"] for problem in held}
    assert 0 < len(new) < 20 and len(lists("mine.jsonl")) == len(lists("mine.jsonl", workdir=None)) == 40
    capsys.readouterr()
    for source in ("mine.jsonl", "./mine.jsonl", str(tmp_path / "mine.jsonl"), "min*.jsonl"):
        assert {*lists(source, problems="mine.jsonl")} == new
        assert f"; run was trained on {40 - len(new)} of them" in capsys.readouterr().err
    seen = {problem.messages[0]["content"] for problem in training}
    assert "new" in lists("part.jsonl", problems="mine.jsonl")
    assert not seen & {*lists("part.jsonl", problems="mine.jsonl")}
    fingerprint = open_problems("mine.jsonl", 0, 0.1).fingerprint
    assert {*lists("mine.jsonl", problems="elsewhere/mine.jsonl", fingerprint=fingerprint)} == new, "it has moved"


def test_problems_whose_answers_a_run_was_fine_tuned_on_are_not_asked(lists, tmp_path):
    problem = Problem(({"role": "user", "content": "3 + 1"},), "4", "exact")
    row = conversation(problem, Response({"role": "assistant", "content": "4"}, 1, 2, True), 0, thinking=False)
    (tmp_path / "kept.jsonl").write_text(json.dumps(row) + "\n")
    found = lists("mine.jsonl", data=str(tmp_path / "kept.jsonl"))
    assert len(found) == 39 and "3 + 1" not in found
    (tmp_path / "one.jsonl").write_text('{"prompt": "3 + 1", "answer": "4"}')
    with pytest.raises(UserError, match="of 1 problems there, none is new to the model"):
        lists("one.jsonl", data=str(tmp_path / "kept.jsonl"))


@pytest.mark.slow
def test_the_loss_of_all_positions_is_that_of_the_text(tmp_path, monkeypatch, capsys):
    """Of text that fills three sequences and a part of a fourth, beside the model's own logits."""
    import deepseek_jax

    config = run_config.load("tiny_v1")
    config.model.update(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_width=8, dense_width=16)
    config.data.cache_dir = str(tmp_path / "cache")
    model = deepseek_jax.build(config)
    monkeypatch.setattr("deepseek_jax.language_model.load", lambda _: model)
    (tmp_path / "one.txt").write_text("a needle in a haystack, " * 6)
    words = ["--from=x", "--by-position", f"--text={tmp_path}/*.txt", "--length=40", f"--out={tmp_path}/found"]
    assert cli.main(["evaluate", *words]) == 0
    found, shown = json.loads((tmp_path / "found").read_text()), capsys.readouterr().out
    assert [(one["start"], one["end"]) for one in found["ranges"]] == [(0, 16), (16, 32), (32, 40)]
    text, _ = open_splits(seed=0, **config.data)
    assert found["sequences"] == text.n_samples > 2 and "32 to 39" in shown
    batch = text.rows(0, text.n_samples)
    logp_BTV = np.asarray(jax.nn.log_softmax(model(batch.ids_BT)))
    nll_BT = -np.take_along_axis(logp_BTV, np.maximum(batch.targets_BT, 0)[..., None], axis=-1)[..., 0]
    for one in found["ranges"]:
        at_BT = (batch.positions_BT >= one["start"]) & (batch.positions_BT < one["end"]) & (batch.targets_BT >= 0)
        assert one["weight"] == at_BT.sum() and one["nats"] == pytest.approx(nll_BT[at_BT].mean(), rel=1e-5)
    lengths = np.asarray(text.tokenizer.byte_lengths())[batch.targets_BT[batch.targets_BT >= 0]]
    bits = nll_BT[batch.targets_BT >= 0].sum() / lengths.sum() / np.log(2)
    assert 7 < bits < 9
    whole = sum(one["weight"] * one["nats"] for one in found["ranges"])
    assert whole == pytest.approx(bits * lengths.sum() * np.log(2), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of lm-eval and what it imports
def test_an_unknown_task_is_said(capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra evaluate)")
    assert cli.main(["evaluate", "--from=x", "--tasks=piqa,no_task_of_this_name"]) == 2
    assert "lm-eval has no no_task_of_this_name" in capsys.readouterr().err
