"""What a model's answers come to: from answers that are given, without a model; the verb is tested in test_rl_verb."""

import json

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.rl.evaluation import GREEDY, Draws, Place, Record, places, results
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import Response, Rewards
from deepseek_jax.rl.rewards.verifiers import alike

ABOUT = {"model": "m", "seed": 0}


def response(content, is_finished=True, thought=""):
    message = {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})
    return Response(message, 4, 8, is_finished)


def given(*answers):
    """Answers to problems: the greedy one, then the drawn ones."""
    return {Place(n, s - 1): one for n, of in enumerate(answers) for s, one in enumerate(of)}


def problem(answer, kind="number"):
    return Problem(({"role": "user", "content": "?"},), answer, kind)


def test_results_worked_by_hand():
    """Three problems, four samples each: 2 right of 4 and a vote of 2 : 1 : 1; 1 right, 1 : 2; none."""
    answers = given(
        map(response, ["It is 7", "7", "is 7.0", "8", "9"]),
        map(response, ["8", "1", "2.0", "2", "7"]),
        [response("3", False), *(response("7", False, "so") for _ in range(4))],
    )
    with Rewards({"accuracy": 1.0}) as rewards:
        found = results([problem("7")] * 3, answers, 4, rewards)
        alone = results([problem("7")] * 3, answers, 0, rewards)
    values = {name: one.value for name, one in found.estimates.items()}
    assert values == pytest.approx(
        {"greedy": 1 / 3, "pass@1": (2 / 4 + 1 / 4) / 3, "pass@2": (5 / 6 + 1 / 2) / 3, "pass@4": 2 / 3, "maj@4": 1 / 3}
    )
    assert found.shares == pytest.approx({"answer_length": 4, "thought": 1 / 3, "cut_off": 1 / 3, "unscored": 0})
    assert list(alone.estimates) == ["greedy"] and alone.shares["thought"] == 0
    assert found.as_json()["pass@1"]["problems"] == 3


def test_what_cannot_be_scored_is_left_out():
    """The first problem's own answer cannot be read."""
    answers = given(*[[response("7")] * 3] * 2)
    with Rewards({"accuracy": 1.0}) as rewards:
        found = results([problem("7 or 8"), problem("7")], answers, 2, rewards)
    assert {(one.value, one.problems) for one in found.estimates.values()} == {(1.0, 1)}
    assert found.shares["unscored"] == 0.5


@pytest.mark.parametrize(
    ("kind", "contents", "groups"),
    [
        ("exact", ["a", " a ", "b", ""], [0, 0, 1, None]),
        ("number", ["1,000", "so 1e3", r"\boxed{1000} or 2", r"\boxed{1", "one"], [0, 0, 0, None, None]),
    ],
)
def test_answers_are_equal_as_the_verifier_sees_them(kind, contents, groups):
    assert alike(kind, contents) == groups


def test_right_answers_that_need_not_be_equal_have_no_vote():
    with Rewards({"accuracy": 1.0}) as rewards:
        assert rewards.alike(["code", "reasoning_gym", "exact"], [["a", "a"]] * 3) == [None, None, [0, 0]]


def test_formulas_are_equal_by_math_verify():
    pytest.importorskip("math_verify")
    assert alike("math", [r"\boxed{\frac12}", "so \\boxed{0.5}", r"\boxed{x+1}", r"\boxed{1+x}", "1"]) == [
        0, 0, 1, 1, None]  # fmt: skip


def test_a_draw_depends_on_its_place_alone():
    draws = Draws(0.6, 0.95, 3)
    seeds = {draws.sampling(Place(n, s), 8, (1,)).seed for n in range(5) for s in range(5)}
    assert len(seeds) == 25 and draws.sampling(Place(2, 1), 8, ()) == draws.sampling(Place(2, 1), 8, ())
    greedy = draws.sampling(Place(2, GREEDY), 8, (1,))
    assert greedy.temperature == 0 and greedy.top_p == 1
    assert places(2, 1) == [(0, GREEDY), (0, 0), (1, GREEDY), (1, 0)]


def test_a_record_resumes_after_a_torn_line_and_refuses_other_settings(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with Record(path, ABOUT) as record:
        for n in range(3):
            record.add(Place(n, 0), response(str(n), thought="so"))
    path.write_bytes(path.read_bytes()[:-20])
    with Record(path, ABOUT) as record:
        assert record.answers == {Place(n, 0): response(str(n), thought="so") for n in range(2)}
        record.add(Place(2, 0), response("2"))
    with Record(path, ABOUT) as record:
        assert len(record.answers) == 3
        with pytest.raises(UserError, match="is being written by another process"):
            Record(path, ABOUT)
    with pytest.raises(UserError, match="holds something else than answers of .*the same settings"):
        Record(path, ABOUT | {"seed": 1})
    path.write_bytes(path.read_bytes()[:9])  # killed in its first line
    with Record(path, ABOUT) as record:
        assert not record.answers
    assert json.loads(path.read_bytes()) == {"about": ABOUT}
    (tmp_path / "other").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="holds something else"):
        Record(tmp_path / "other", ABOUT)
    with Record(None, ABOUT) as record:
        record.add(Place(0, 0), response("2"))
    assert record.answers
