"""Rewards: right answers get them, and nothing that only looks like one does."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax.data.chat import template
from deepseek_jax.errors import UserError
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import NOTHING_TO_SAY, Response, Rewards, rules
from deepseek_jax.rl.rewards.processes import Failed, Workers
from deepseek_jax.rl.rewards.verifiers import VERIFIERS

QUESTION = ({"role": "user", "content": "How much is 3 times 4 minus 4?"},)


def response(content="8", thought="", n_tokens=10, n_allowed=100, is_finished=True):
    message = {"role": "assistant", "content": content, "reasoning_content": thought}
    return Response(message, n_tokens, n_allowed, is_finished)


def problem(answer="8", kind="exact", messages=QUESTION):
    return Problem(messages, answer, kind)


RIGHT = {
    ("exact", "8"): ["8", " 8\n"],
    ("number", "8"): ["8", "It is 8.", r"so \boxed{8}", "first 7, then 8.0", "16/2", "8e0", "+8", r"7 \boxed{8} 9"],
    ("number", "-1,234.5"): ["-1234.5", "−1,234.50", r"\boxed{-2469/2}"],
    ("math", "1/2"): [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{3} no, \boxed{1/2}"],
    ("math", "x^2"): [r"\boxed{x \cdot x}"],
}
# What a policy might find: none of it may be rewarded.
WRONG = {
    ("exact", "8"): """
        9|88|8 8|8.|08|8.0|eight|8 or 9|=8||<think>8</think>|**8**|"8"|８|8\t8|[8]|0b1000|-8|+8|8\\n|8,|_8|
        \\boxed{8}|int("8")|the answer|7 8|8 7|{8}|8;|answer: 8|8\u200b""",
    ("number", "8"): r"""
        9|88|8 9|8 8 9|-8|8x|x8|8_0|0x8|8.1|8.0001|1e8|8e1|8/2|8/0|1/0|\boxed{8 9}|\boxed{9} 8|\boxed{}|
        \boxed{8|\boxed{\boxed{9}} 8|8th|v8.9|eight|nan|inf|8 or 9|12345678|8,000|8.9|٨|８|8 of 10|[8, 9]|
        8 = 9|""",
    ("math", "8"): r"""
        8|x = 8|\boxed{9}|\boxed{8}\boxed{9}|\boxed{7, 8}|\boxed{\{7, 8\}}|\boxed{x}|\boxed{x = 8}|\boxed{}|
        \boxed{8|\boxed{3 \cdot 4 - 4}|\boxed{4 + 4}|\boxed{8!}|\boxed{2^3}|\boxed{7 < x < 9}|
        \boxed{8 \neq x}|\boxed{[8, 9]}|\boxed{\infty}|\boxed{8 or 9}|\boxed{\text{8 or 9}}|\boxed{8.01}|
        \boxed{-8}|\boxed{80}|\boxed{x = x}|\boxed{8 = 8}|\boxed{12 - 4}|\boxed{4*2}|\boxed{\text{eight}}|
        \boxed{all real numbers}|\boxed{\mathbb{R}}|\boxed{(7, 9)}|\boxed{16 \div 2}""",
}  # fmt: skip


def cases(table):
    found = []
    for (kind, answer), contents in table.items():
        contents = contents if isinstance(contents, list) else [c.strip(" \n") for c in contents.split("|")]
        found.append(pytest.param(kind, answer, contents, id=f"{kind} {answer}"))
    return found


def needed(kind):
    if kind == "math":
        pytest.importorskip("math_verify")


@pytest.mark.parametrize(("kind", "answer", "contents"), cases(RIGHT))
def test_right_answers_are_rewarded(kind, answer, contents):
    needed(kind)
    assert [content for content in contents if VERIFIERS[kind](answer, content) != 1.0] == []


@pytest.mark.parametrize(("kind", "answer", "contents"), cases(WRONG))
def test_what_looks_like_an_answer_is_not_rewarded(kind, answer, contents):
    needed(kind)
    assert len(contents) >= 30
    assert [content for content in contents if VERIFIERS[kind](answer, content) != 0.0] == []


@pytest.mark.parametrize(("kind", "answers"), [("number", ["", "x", "1 2", "1/0", "9" * 200]), ("math", ["", "???"])])
def test_an_answer_of_the_problem_that_cannot_be_read_gives_no_reward_to_anyone(kind, answers):
    needed(kind)
    assert [VERIFIERS[kind](answer, r"\boxed{8}") for answer in answers] == [None] * len(answers)


def test_numbers_that_would_take_long_are_not_computed():
    begin = time.process_time()
    for content in ("9" * 10**6, "1e999", "1e-999", "1/" + "3" * 10**6, "-" * 10**5, "1," * 10**5):
        assert VERIFIERS["number"]("8", content) == 0.0
    assert time.process_time() - begin < 2


FORMAT = {
    "<think>\nthree\n</think>\n\n8<｜end▁of▁sentence｜>": 1.0,
    "<think>a</think>8<｜end▁of▁sentence｜>": 1.0,
    **dict.fromkeys(
        [
            "8",
            "",
            "<think></think>8",
            "<think>\n\n</think>\n\n8",
            "<think> \t</think>8",
            "<think>a",
            "<think>a</think>",
            "<think>a</think> \n ",
            "<think>a</think><think>b</think>8",
            "<think><think>a</think>8",
            "<think>a</think></think>8",
            "<think>a</think>8</think>",
            "<think>a</think>8<think>",
            "8<think>a</think>",
            "<THINK>a</THINK>8",
            "< think>a</ think>8",
            "<think>a< /think >b</think>8",
            "<thinking>a</thinking>8",
            "think a /think 8",
            "<think>\u200b</think>8",
            "<think>a</think>\u200b",
            "<think>a</think>\ufeff\n",
            "<think>a<think\u200b>b</think>8",
            "<think>a</think>8<think>b</think>9",
            "<think>a</THINK>8",
            "</think>8",
            "</think><think>a</think>8",
            "<think>a</think></think>",
            "<think>a\n</think>\n</think>8",
            "a<think>b</think>8",
            "<think>a</think>< think >8",
        ],
        0.0,
    ),
}


@pytest.mark.parametrize("text", FORMAT)
def test_the_format_is_one_thought_and_one_answer(text):
    message = template("r1").parse(text)
    assert rules.format(problem(), Response(message, 5, 10, True)) == FORMAT[text]
    assert rules.format(problem(), Response(message, 10, 10, False)) == 0.0, "it was cut off"


@pytest.mark.parametrize(
    ("question", "thought", "share"),
    [
        ("How much?", "three times four", 1.0),
        ("How much?", "三乘四", 0.0),
        ("How much?", "three 乘 four", 2 / 3),
        ("多少钱？", "三乘四 is twelve", 3 / 5),
        ("多少钱？", "three times four", 0.0),
        ("Сколько?", "трижды four", 1 / 2),
        ("How much?", "3 * 4 - 4 = 8", 1.0),
        ("How much?", "", 0.0),
        ("How much?", " \n", 0.0),
        ("12 - 4", "twelve", 1.0),
    ],
)
def test_the_language_of_a_thought(question, thought, share):
    asked = problem(messages=({"role": "user", "content": question},))
    assert rules.language(asked, response("8", thought)) == pytest.approx(share)


def test_the_length_of_a_response():
    assert [rules.length(problem(), response(n_tokens=n)) for n in (1, 25, 100)] == [-0.01, -0.25, -1.0]
    penalties = [rules.overlong(problem(), response(n_tokens=n)) for n in (1, 80, 90, 100)]
    assert penalties == pytest.approx([0.0, 0.0, -0.5, -1.0])
    assert rules.overlong(problem(), response(n_tokens=100, is_finished=False)) == -1.0


def test_weights_by_name():
    with Rewards({"accuracy": 1.0, "format": 0.5, "length": 0.0}) as rewards:
        scores = rewards.score(
            [problem()] * 4,
            [response("8", "a"), response("8"), response("9", "a"), response("8", "a", is_finished=False)],
        )
    assert [score.total for score in scores] == [1.5, 1.0, 0.5, 0.0]
    assert scores[0].parts == {"accuracy": 1.0, "format": 1.0, "length": -0.1}


def test_what_cannot_be_verified_has_no_total():
    with Rewards({"accuracy": 1.0, "format": 0.5}) as rewards:
        score, other = rewards.score([problem("?", "number"), problem("8", "number")], [response("8", "a")] * 2)
    assert score.total is None and score.parts == {"accuracy": None, "format": 1.0} and other.total == 1.5
    assert rewards.failures == {f"kind number: {NOTHING_TO_SAY}": 1}
    with Rewards({"accuracy": 0.0, "format": 0.5}) as rewards:
        assert rewards.score([problem("?", "number")], [response("8", "a")])[0].total == 0.5


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"rl.rewards.correct: no reward has this name. Choose among accuracy, format"):
        Rewards({"correct": 1.0})
    with pytest.raises(UserError, match="every weight is 0"):
        Rewards({"accuracy": 0.0})
    with Rewards({"accuracy": 1.0}) as rewards, pytest.raises(UserError, match="a problem has kind 'sum'"):
        rewards.score([problem(kind="sum")], [response()])


def test_a_missing_package_is_said_before_any_answer(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with Rewards({"accuracy": 1.0}) as rewards, pytest.raises(UserError, match="kind math need math-verify, which is"):
        rewards.check({"exact", "math"})


def test_calls_that_hang_or_fail_have_no_result_and_hold_nothing_up():
    """Of the calls of one map some never end, end their process or raise; the others have their results."""
    calls = [(abs, -1), (time.sleep, 60), (abs, -2), (os._exit, 3), (operator.neg, ""), (abs, -5)]
    with Workers(2, seconds=0.2) as workers:
        workers.map(operator.call, [(abs, 0)] * 2)  # both have started: from now on a call has 0.2 s
        found = workers.map(operator.call, calls)
        assert [found[n] for n in (0, 2, 5)] == [1, 2, 5]
        assert found[1] == Failed("no result after 0.2 s") and found[3] == Failed("the process ended")
        assert found[4] == Failed("TypeError: bad operand type for unary -: 'str'")
        with pytest.raises(UserError, match="chat template .nothing.: expected one of"):
            workers.map(template, [("nothing",)])


class Unreadable:
    """Can be handed over and cannot be read: int("eight")."""

    def __reduce__(self):
        return int, ("eight",)


def test_what_cannot_be_read_in_a_worker_fails_with_its_reason():
    """Neither a call nor a result ends the process: the next call has a result as soon as ever."""
    with Workers(1, seconds=0.2) as workers:
        found = workers.map(operator.call, [(abs, Unreadable()), (threading.Lock,), (abs, -1)])
    assert found[0] == Failed("ValueError: invalid literal for int() with base 10: 'eight'")
    assert found[1] == Failed("TypeError: cannot pickle '_thread.lock' object") and found[2] == 1


def test_workers_outlast_an_interrupt_and_are_replaced_when_they_are_killed():
    """Ctrl-C reaches them as well; the step that it interrupts is ended with their results."""
    with Workers(1, seconds=0.2) as workers:
        for number, still in ((signal.SIGINT, True), (signal.SIGHUP, True), (signal.SIGKILL, False)):
            assert workers.map(operator.call, [(abs, -1)]) == [1]
            process = workers._idle[0].process
            os.kill(process.pid, number)
            process.join(0.2)
            assert process.is_alive() == still
        assert workers.map(operator.call, [(abs, -1)]) == [1]
        assert workers.map(time.sleep, [(0.5,), (0.5,)], [1, 20]) == [Failed("no result after 0.2 s"), None]


def test_no_worker_outlives_the_process_that_started_it():
    """Not even in the middle of a call, where that process is killed: then its output is at an end."""
    program = (
        "import operator, os, signal, time\n"
        "from deepseek_jax.rl.rewards.processes import Workers\n"
        "workers = Workers(2, 60.0)\n"
        "workers.map(operator.call, [(time.sleep, 60), (os.kill, os.getpid(), signal.SIGKILL)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.communicate(timeout=30) == (b"", None) and process.returncode == -signal.SIGKILL


def test_why_answers_cannot_be_scored_is_counted():
    """A program has as much time in each test, and as much to be ended: too long is wrong, not unknown."""
    with Rewards({"accuracy": 1.0}, n_processes=1, seconds=5.0) as rewards:
        rewards._checked |= {"code", "math"}
        rewards._workers.map = lambda function, calls, shares: [
            Failed(f"{call[-1]} s, {n:g} times") for call, n in zip(calls, shares, strict=True)
        ]
        scores = rewards.score([problem([{}, {}], "code"), problem(kind="math")] * 2, [response()] * 4)
    assert [score.total for score in scores] == [None] * 4
    assert rewards.failures == {"kind code: 5.0 s, 4 times": 2, "kind math: 5.0 s, 1 times": 2}


def test_slow_verifiers_run_in_processes():
    pytest.importorskip("math_verify")
    with Rewards({"accuracy": 1.0}, n_processes=1) as rewards:
        scores = rewards.score([problem(kind="math")] * 3, [response(r"\boxed{8}"), response("x"), response("8")])
    assert [score.total for score in scores] == [1.0, 0.0, 0.0]
