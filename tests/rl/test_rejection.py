"""Rejection sampling: which answers are kept, and a file that is the same however often its writing was cut."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.data.rows import conversation_text
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _sampling
from deepseek_jax.rl.problems import Problem, open_problems
from deepseek_jax.rl.rejection import Counts, Kept, Rules, complaint, conversation, keep
from deepseek_jax.rl.rewards import Response, Rewards, Score

RULES = Rules(most=2, choose="shortest", longest=20, least={"accuracy": 1.0, "format": 1.0, "language": 0.9})


def response(content="7", n_tokens=5, thought="1234", is_finished=True):
    return Response({"role": "assistant", "content": content, "reasoning_content": thought}, n_tokens, 30, is_finished)


def score(accuracy=1.0, format=1.0, language=1.0):
    return Score(accuracy, {"accuracy": accuracy, "format": format, "language": language})


@pytest.mark.parametrize(
    ("given", "parts", "why"),
    [
        ({}, {}, ""),
        ({"n_tokens": 20}, {"language": 0.9}, ""),
        ({"is_finished": False}, {"accuracy": 0.0}, "cut off"),
        ({}, {"accuracy": 0.0}, "accuracy"),
        ({}, {"accuracy": None}, "not scored"),
        ({}, {"format": 0.0}, "format"),
        ({}, {"language": 0.89}, "language"),
        ({"n_tokens": 21}, {}, "too long"),
    ],
)
def test_an_answer_is_dropped_for_a_reason(given, parts, why):
    assert complaint(response(**given), score(**parts), RULES) == why


def test_a_bound_of_zero_asks_for_nothing():
    rules = RULES._replace(longest=0, least=RULES.least | {"language": 0.0, "format": 0.0})
    assert complaint(response(n_tokens=29), score(format=0.0, language=None), rules) == ""


def test_the_shortest_are_kept_and_equal_answers_count_once():
    answers = [response(thought=text, n_tokens=n) for text, n in (("12", 9), ("34", 7), ("34", 7), ("5", 6), ("6", 6))]
    scores = [score(), score(), score(), score(accuracy=0.0), score()]
    places, counts = keep(answers, scores, RULES)
    assert places == [4, 1]
    assert counts == {"kept": 2, "repeated": 1, "accuracy": 1, "more than sample.most": 1}
    places, _ = keep(answers, scores, RULES._replace(choose="first"))
    assert places == [0, 1]


def test_answers_that_a_problem_quotes_are_context():
    quoted = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    row = conversation(Problem(tuple(quoted), "7", "exact"), response(), 5, thinking=False)
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, None]
    read = json.loads(conversation_text(row, "row"))
    assert read["messages"][-1]["reasoning_content"] == "1234" and read["thinking"] is False


class Clown:
    """In place of a `Learner`: answers right or wrong by the key of a row alone."""

    def __init__(self, rewards, mark="a"):
        self.rewards, self.mark = rewards, mark
        self.problems = open_problems("sums:6", 0, 0.1)
        self.sizes = SimpleNamespace(n_rows=8)
        self.turns = SimpleNamespace(name="r1", thinking=False)

    def draw(self, state, asked, keys, temperature):
        assert len(asked) == len(keys) == 8 and len({tuple(key) for key in keys.tolist()}) == 8
        found = []
        for problem, key in zip(asked, keys.tolist(), strict=True):
            digit = str((int(problem.answer) + key[1] % 2) % 10)
            found.append(response(digit, 5 + key[1] % 7, thought=f"{self.mark}{key[1] % 5}"))
        return SimpleNamespace(problems=asked, responses=found)


@pytest.fixture
def config():
    config = run_config.load("tiny_zero")
    config.sample.problems, config.sample.answers, config.sample.most = 13, 2, 2
    return config


def collect(config, path, n_batches, about=None, mark="a"):
    """Writes up to `n_batches` batches of answers to `path`."""
    rules = _sampling.rules_of(config)
    weights = {"accuracy": 1.0, "format": 0.0, "language": 0.0}
    with Rewards(weights) as rewards, Kept(path, about or {"seed": 0}, "here") as kept:
        while kept.next < config.sample.problems and n_batches:
            _sampling.add_batch(config, Clown(rewards, mark), {}, rules, kept)
            n_batches -= 1
    return kept


def test_a_file_that_was_cut_anywhere_is_the_one_written_at_once(config, tmp_path):
    whole = collect(config, tmp_path / "whole.jsonl", 99)
    content = (tmp_path / "whole.jsonl").read_bytes()
    numbers = [json.loads(row)["problem"] for row in content.splitlines()]
    assert whole.next == 13 and whole.counts.total() == 26 and len(numbers) == whole.counts["kept"]
    assert numbers == sorted(numbers) and 0 < len(numbers) < 26 and max(numbers) <= 12
    cut = tmp_path / "cut.jsonl"
    collect(config, cut, 0)
    cut.write_bytes(content[:99])  # killed in the first batch
    for n in range(4):
        collect(config, cut, 1)
        with open(cut, "ab") as file:  # a batch whose progress was not written any more
            file.write(b'{"problem": 99, "mess'[: 5 * n])
    assert collect(config, cut, 0).next == 13 and cut.read_bytes() == content
    config.sample.problems = 4  # fewer, then more: as asked for at once
    collect(config, tmp_path / "more.jsonl", 99)
    config.sample.problems = 13
    more = collect(config, tmp_path / "more.jsonl", 99)
    assert (tmp_path / "more.jsonl").read_bytes() == content and more.counts == whole.counts


def test_each_problem_of_a_list_is_asked_once(config, tmp_path, monkeypatch):
    rows = [json.dumps({"prompt": str(n), "answer": str(n % 10)}) for n in range(11)]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows))
    listed = open_problems(str(tmp_path / "problems.jsonl"), 0, 0.1)
    monkeypatch.setattr(sys.modules[__name__], "open_problems", lambda *_: listed)
    assert 4 < listed.n_training < 11
    path = tmp_path / "kept.jsonl"
    kept = collect(config, path, 99)
    numbers = [json.loads(row)["problem"] for row in path.read_bytes().splitlines()]
    assert kept.counts.total() == 2 * listed.n_training and max(numbers) < listed.n_training
    assert kept.next == 13, "as many as were asked for are in the file: a list has no others"


def test_a_file_of_other_settings_is_refused(config, tmp_path):
    path = tmp_path / "kept.jsonl"
    collect(config, path, 1)
    with pytest.raises(UserError, match=r"holds answers of other settings: seed: 0 -> 1. Give the same ones"):
        collect(config, path, 1, about={"seed": 1})
    with Kept(path, {"seed": 0}, "here"), pytest.raises(UserError, match="is being written by another process"):
        collect(config, path, 1)
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"has 0 bytes, and had \d+. Remove it"):
        collect(config, path, 1)
    path.write_bytes(content)
    (tmp_path / "kept.jsonl.about").unlink()
    with pytest.raises(UserError, match=r"kept.jsonl exists, without kept.jsonl.about beside it"):
        collect(config, path, 1)


def test_settings_that_keep_nothing_or_divide_no_batch_are_refused(config, tmp_path):
    config.sample.answers = 5
    with pytest.raises(UserError, match=r"sample.answers=5: 128 answers are drawn at a time"):
        _sampling.check(config)
    config.sample.answers = 4
    for name in config.sample.least:
        config.sample.least[name] = 0.0
    with pytest.raises(UserError, match="every bound is 0, so any answer would do"):
        _sampling.check(config)
    with Kept(tmp_path / "none.jsonl", {}, "here") as empty:
        empty.add([], Counts(accuracy=2), 2)
    with pytest.raises(UserError, match=r"0 of 2 answers kept \(dropped: accuracy 2\). Lower config.sample.least"):
        _sampling.report(empty)


def test_the_verb_takes_its_config_from_the_weights(tmp_path):
    from deepseek_jax.launch import sample

    with pytest.raises(UserError, match=r"--out is missing"):
        sample.main(["--workdir=runs/a"])
    with pytest.raises(UserError, match=r"expected --from=DIR for published weights, or --workdir=RUN"):
        sample.main([f"--out={tmp_path}/a.jsonl"])
    with pytest.raises(UserError, match="no such directory"):
        sample.main([f"--out={tmp_path}/a.jsonl", f"--workdir={tmp_path}/none"])


def test_draws_are_not_those_of_training():
    from deepseek_jax.rl.rollout import row_keys

    seed = _sampling.seed_of(3)
    assert not np.array_equal(row_keys(seed, 0, 4), row_keys(3, 0, 4)) and seed != _sampling.seed_of(4)
