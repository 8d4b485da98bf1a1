"""Problems by number: the same for the same (seed, number), whatever was asked before; held-out ones stay so."""

import json

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.rl import sums
from deepseek_jax.rl.problems import held_out, listed, open_problems
from deepseek_jax.rl.rewards.verifiers import exact


@pytest.fixture
def file(tmp_path):
    rows = [{"prompt": f"{n} + 1", "answer": str(n + 1), "kind": "number"} for n in range(40)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(problem):
    return problem.messages[0]["content"]


def test_a_problem_is_a_function_of_seed_and_number(file):
    for source in ("sums", "sums:4", "needle:100", file):
        first, again, other = (open_problems(source, seed, 0.2) for seed in (3, 3, 4))
        numbers = (7, 0, 55, 7, 31)
        assert [first.training(n) for n in numbers] == [again.training(n) for n in reversed(numbers)][::-1]
        assert [first.training(n) for n in range(9)] != [other.training(n) for n in range(9)]
        assert [first.held_out(n) for n in range(5)] == [other.held_out(n) for n in range(5)]
        assert first.fingerprint == again.fingerprint
    assert open_problems("sums:4", 0, 0.2).fingerprint != open_problems("sums:6", 0, 0.2).fingerprint


def test_no_held_out_problem_is_trained_on(file):
    for source in ("sums:2", file):  # few different ones: each occurs
        problems = open_problems(source, 0, 0.2)
        held_out = {text(problems.held_out(n)) for n in range(problems.n_held_out or 100)}
        assert held_out and not held_out & {text(problems.training(n)) for n in range(150)}


def test_equal_problems_of_a_list_are_on_the_same_side(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "answer": "1"}) + "\n" for n in range(9)) * 2)
    problems = open_problems(str(path), 0, 0.0)
    assert problems.n_held_out == 2 and problems.n_training == 16
    assert text(problems.held_out(0)) not in {text(problems.training(n)) for n in range(16)}


def test_an_epoch_of_a_file_has_each_problem_once(file):
    problems = open_problems(file, 0, 0.2)
    count = 40 - problems.n_held_out
    epochs = [[text(problems.training(n)) for n in range(start, start + count)] for start in (0, count)]
    assert len(set(epochs[0])) == count and sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_answers_of_the_built_in_text():
    """All styles occur; without mistakes every answer is right, and a thought has the totals."""
    assert sums.written("479305", 0, {1: 1.0}, 0.0) == {
        "role": "assistant", "content": "8", "reasoning_content": "1410338"}  # fmt: skip
    assert sums.written("479305", 0, {2: 1.0}, 0.0)["reasoning_content"] == "2138"
    problems = open_problems("sums", 1, 0.1)
    found = []
    for n in range(300):
        problem = problems.training(n)
        assert exact(problem.answer, sums.written(text(problem), n, mistakes=0.0)["content"]) == 1.0
        answer = sums.written(text(problem), n)
        found.append((answer.get("reasoning_content", "0")[0], exact(problem.answer, answer["content"])))
    styles = [style for style, _ in found]
    assert 0.5 < styles.count("0") / 300 < 0.7 and {*styles} == {"0", "1", "2"}
    assert 0.85 < np.mean([right for _, right in found]) < 0.99


def test_rows_in_the_forms_of_gsm8k_and_math(tmp_path):
    rows = [
        {"question": "How many?", "answer": "1 + 2 = <<1+2=3>>3\n#### 1,003"},
        {"problem": "Find $x$.", "solution": r"It is \boxed{1} or rather \boxed{\frac{1}{2}}.", "level": "Level 5"},
        {"problem": "Find $x$.", "solution": "As above.", "answer": 70, "url": "a"},
        {"question": "2", "prompt": "1 + 1", "answer": "2"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    problems, fingerprint = listed(str(path))
    assert [(problem.answer, problem.kind) for problem in problems] == [
        ("1003", "math"), (r"\frac{1}{2}", "math"), ("70", "math"), ("2", "exact")]  # fmt: skip
    assert text(problems[0]).startswith("How many?\nPlease reason step by step") and r"\boxed{}" in text(problems[1])
    path.write_text(json.dumps({"problem": "Find $x$.", "solution": "I cannot."}))
    with pytest.raises(UserError, match="line 1 is not a problem"):
        listed(str(path))
    assert len(fingerprint) == 24


def test_held_out_problems_of_a_source(tmp_path):
    problems, fingerprint = held_out("sums:4", 0.2, 3)
    assert problems == [open_problems("sums:4", 7, 0.2).held_out(n) for n in range(3)] and fingerprint == "sums:4 0.2"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": str(n), "answer": "1"}) for n in range(40)))
    n_held_out = open_problems(str(path), 0, 0.2).n_held_out
    assert [len(held_out(str(path), 0.2, count)[0]) for count in (0, 2, 100)] == [n_held_out, 2, n_held_out]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1 + 1"}, "line 1 is not a problem"),
        ({"prompt": "a", "answer": [{"input": "1"}], "kind": "code"}, "line 1: the answer of kind code is"),
        ({"prompt": "a", "answer": [], "kind": "code"}, "line 1: the answer of kind code is"),
        ({"prompt": "a", "messages": [], "answer": "2"}, "line 1 is not a problem"),
        ({"messages": [{"role": "assistant", "content": "2"}], "answer": "2"}, r"line 1: messages\[0\] has role"),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "answer": "2"},
            "Leave",
        ),
    ],
)
def test_a_row_that_is_no_problem_is_named(tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        open_problems(str(path), 0, 0.1)


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    for source in ("sums:5", "sums:99", "sums:x"):
        with pytest.raises(UserError, match="expected an even number of digits"):
            open_problems(source, 0, 0.1).training(0)
    with pytest.raises(UserError, match="is not a .jsonl file"):
        (tmp_path / "a.txt").write_text("1 + 1")
        open_problems(str(tmp_path / "a.txt"), 0, 0.1)
    with pytest.raises(UserError, match=r"rl.problems=nowhere.jsonl: no such file. Give JSONL files, sums:DIGITS"):
        open_problems("nowhere.jsonl", 0, 0.1)
    with pytest.raises(UserError, match="has no problem to train on"):
        (tmp_path / "a.jsonl").write_text('{"prompt": "1", "answer": "1"}')
        open_problems(str(tmp_path / "a.jsonl"), 0, 1.0)
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match="needs reasoning-gym, which is not installed"):
        open_problems("rg:leg_counting", 0, 0.1)


def test_tasks_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    from deepseek_jax.rl.rewards.verifiers import reasoning_gym

    problems = [open_problems("rg:leg_counting", 2, 0.1) for _ in range(2)]
    one, two = (found.training(5) for found in problems)
    assert one == two and one.kind == "reasoning_gym" and one != problems[0].training(6)
    right = one.answer["entry"]["answer"]
    assert reasoning_gym(one.answer, right) == 1.0
    near = [int(right) + by for by in (-10, -2, -1, 1, 2, 10)]
    wrong = [
        f"{right} or {near[3]}",
        "",
        " ",
        "legs",
        "none",
        "<think>",
        "eval",
        "['legs']",
        "{}",
        "None",
        "nan",
        "inf",
    ]
    wrong += [str(n) for n in near] + [f"-{right}", f"{right}0", f"1{right}", f"{right}.5", f"{right}e1", f"{right}/2"]
    wrong += [f"{right}+1", f"{right}{right}", f"{right}, {near[0]}", f"0x{right}", f"{right} legs and 1", f"~{right}!"]
    assert len(wrong) >= 30 and [text for text in wrong if reasoning_gym(one.answer, text) != 0.0] == []
    with pytest.raises(UserError, match="has no task of this name"):
        open_problems("rg:nothing", 0, 0.1)


@pytest.mark.parametrize("task", ["spiral_matrix", "countdown", "polynomial_multiplication", "n_queens"])
def test_tasks_that_run_an_answer_as_a_program_are_refused(task):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=f"rg:{task}: reasoning-gym scores answers to this task by running them"):
        open_problems(f"rg:{task}", 0, 0.1)


def test_a_needle_lies_where_it_is_asked_for():
    """Once in every text, whose length is the one named; without a depth it lies anywhere."""
    for depth in (0, 25, 100):
        for number in range(5):
            haystack, _, question = text(
                problem := open_problems(f"needle:400@{depth}", 0, 0.2).training(number)
            ).rpartition("\n")
            name = question.removeprefix("What is the code of ").removesuffix("?")
            needle = f"The code of {name} is {problem.answer}."
            assert haystack.count(needle) == haystack.count("The code") == 1 and 390 <= len(haystack) <= 400
            before = len(haystack.partition(needle)[0])
            assert abs(before / (len(haystack) - len(needle)) - depth / 100) < 0.04
    anywhere = [text(open_problems("needle:400", 0, 0.2).training(n)).index("The") for n in range(40)]
    assert min(anywhere) < 60 and max(anywhere) > 300
    for wrong in ("needle:9", "needle:100@101", "needle:a", "needle:1e3"):
        with pytest.raises(UserError, match="expected a length of 64"):
            open_problems(wrong, 0, 0.2)
