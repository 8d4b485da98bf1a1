"""Rollouts, updates and the loop on the smallest V3: what is drawn is what is learnt from; resuming is exact."""

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax import run, run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import split
from deepseek_jax.parallel.mesh import fetched, make_mesh
from deepseek_jax.rl.distillation import Teacher
from deepseek_jax.rl.engine_rollout import EngineRoller, rollouts
from deepseek_jax.rl.grpo import GRPO
from deepseek_jax.rl.loop import REFERENCE, TAKEN_AT, Loop, LoopConfig
from deepseek_jax.rl.objective import PolicyGradient, answers, learnt, part
from deepseek_jax.rl.problems import Problem, open_problems
from deepseek_jax.rl.rewards import RULES, Rewards, Score
from deepseek_jax.rl.rollout import pad, roller, row_keys
from deepseek_jax.rl.step import Learner, StepSizes
from deepseek_jax.rl.turns import Turns
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.generate import ENDED, Generator
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.metrics import Metrics
from deepseek_jax.train.stop import StopRequest

TEMPERATURE, NEW = 0.7, 6
WEIGHTS = {"accuracy": 1.0, "length": 0.5}


def make_config(n_dense_layers=0):
    config = run_config.load("tiny_zero").copy_and_resolve_references().unlock()
    m = config.model
    m.d_model, m.dense_width, m.n_heads, m.n_experts, m.expert_width = 16, 16, 2, 4, 8
    m.n_layers, m.n_dense_layers = 2, n_dense_layers
    m.q_rank = m.kv_rank = m.nope_width = m.rope_width = m.value_width = 8
    config.rl.longest_answer = NEW
    return config


def make_learner(rewards, *mesh, micro_batches=1, beta=0.1, top_p=1.0, rows_at_once=0, embed="", n_dense=0, **options):
    config = make_config(n_dense)
    config.rl.grpo.beta = beta
    config.pipeline.micro_batches, config.sharding.embed = micro_batches, embed
    objective = PolicyGradient(GRPO(**config.rl.grpo), TEMPERATURE, 64)
    devices = jax.devices()[: np.prod(mesh, dtype=int)]
    trainer = run.trainer(config, make_mesh(*(mesh or (1, 1)), devices), objective, **options)
    turns = Turns(ByteTokenizer(), "r1", False, 9, NEW)
    problems = open_problems("sums:4", 0, 0.2)
    return Learner(trainer, turns, problems, rewards, StepSizes(4, 4, 2, TEMPERATURE, top_p, rows_at_once), seed=3)


@pytest.fixture(scope="module")
def learner():
    """Rewards are for length as well, which differs between answers of a model without training; routes are kept."""
    with Rewards(WEIGHTS) as rewards:
        yield make_learner(rewards, routes=True)


@pytest.fixture(scope="module")
def state(learner, begun):
    return jax.device_get(begun(learner.trainer))


def placed(learner, state):
    """A state on the devices, which a step may take over."""
    abstract = learner.trainer.abstract
    return jax.tree.map(lambda x, like: jax.device_put(np.array(x), like.sharding), state, abstract)


def asked(*questions):
    return [Problem(({"role": "user", "content": question},), "0", "exact") for question in questions]


QUESTIONS = ["1234", "5", "99", "123456"] * 4  # prompts of different lengths


@pytest.fixture(scope="module")
def drawn(learner, state):
    return learner.draw(placed(learner, state), asked(*QUESTIONS), row_keys(0, 0, 16), TEMPERATURE)


def test_what_is_drawn_has_the_log_probabilities_of_the_trainer(learner, state, drawn):
    """Absorbed attention over a cache against the expanded form, prompts of different lengths, a temperature."""
    given = answers(drawn.rollouts, drawn.length_B1, np.ones(16, bool))
    found = learner._measure(placed(learner, state), learner._placed(given))
    is_drawn_BT = given.targets_BT >= 0
    assert is_drawn_BT.sum() == drawn.rollouts.n_drawn_B1.sum() > 40
    gap_BT = np.abs(np.asarray(found.logp_BT) - given.sampled_logp_BT)[is_drawn_BT]
    assert gap_BT.max() < 1e-5
    np.testing.assert_array_equal(given.targets_BT[is_drawn_BT], drawn.rollouts.ids_BT[:, 1:][is_drawn_BT])
    texts = [learner.turns.tokenizer.decode(row[mask]) for row, mask in zip(given.targets_BT, is_drawn_BT, strict=True)]
    again = [learner.turns.tokenizer.encode(text).tolist() for text in texts]
    assert again != [row[mask].tolist() for row, mask in zip(given.targets_BT, is_drawn_BT, strict=True)], (
        "ids stay ids"
    )
    assert (given.sampled_logp_BT[is_drawn_BT] < 0).all() and (np.asarray(found.entropy_BT)[is_drawn_BT] > 0).all()


@pytest.fixture(scope="module")
def make_engine():
    """Engines of the smallest V3, which share their programs."""
    definition, made = split(abstract_module(make_config()))[0], []

    def make(weights):
        made.append(Engine(definition, weights, 32, page_size=8, n_rows=4, chunk=16))
        made[-1]._pads_to_largest = True
        return made[-1]

    return make


@pytest.mark.slow
def test_the_engine_draws_the_same_answers(learner, state, make_engine):
    """With the same keys, at temperatures 1 and 0, also with weights that have replaced others."""
    weights = jax.tree.map(jax.numpy.asarray, (state["params"], state["router_bias"]))
    others = jax.tree.map(lambda x: x + 0.01, weights)
    engine = make_engine(others)
    prompts = [learner.turns.prompt(problem, "") for problem in asked(*QUESTIONS)]
    for temperature, drawn_with in ((1.0, others), (1.0, weights), (0.0, weights)):
        given = pad(prompts, 9, row_keys(5, 1, 16), temperature)
        found = rollouts(engine, drawn_with, given, NEW, [learner.turns.end_id])
        as_state = state | dict(zip(("params", "router_bias"), drawn_with, strict=True))
        expected = learner.draw(placed(learner, as_state), asked(*QUESTIONS), given.key_BK, temperature).rollouts
        np.testing.assert_array_equal(found.n_drawn_B1, expected.n_drawn_B1)
        np.testing.assert_array_equal(found.is_finished_B1, expected.is_finished_B1)
        np.testing.assert_array_equal(found.ids_BT, expected.ids_BT)
        np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=1e-5)
        assert engine.weights is drawn_with and found.kept_BTV.shape == expected.kept_BTV.shape
    engine.replace_weights(others)
    with pytest.raises(UserError, match="answers of up to 30: expected 32 together"):
        rollouts(engine, weights, given, 30, [])
    assert engine.weights is others
    with pytest.raises(UserError, match="temperature 0.5: expected 1, or 0"):
        given = given._replace(temperature_B1=np.where(np.arange(16)[:, None] == 7, 0.5, 1).astype(np.float32))
        rollouts(engine, weights, given, NEW, [])


@pytest.mark.slow
def test_layers_one_by_one_draw_the_same(learner, state, drawn):
    """As a GPU runs them, each with weights and a cache of its own."""
    rolled = roller(NEW, learner.turns.end_ids, 1.0)
    apart = learner.trainer.with_model(rolled, stacks=True, loop=False)
    prompts = [learner.turns.prompt(problem, "") for problem in asked(*QUESTIONS)]
    given = learner._placed(pad(prompts, 9, row_keys(0, 0, 16), TEMPERATURE))
    found = fetched(apart(placed(learner, state), given))
    np.testing.assert_array_equal(found.ids_BT, drawn.rollouts.ids_BT)
    np.testing.assert_allclose(found.logp_BT, drawn.rollouts.logp_BT, atol=1e-5)
    for name, routes_BTLK in drawn.rollouts.routes.items():
        np.testing.assert_array_equal(found.routes[name], routes_BTLK)


def test_the_experts_of_the_draw_are_visited_again(learner, state, drawn):
    """V3.2's Keep Routing: those of the prompt, too; routers of the same weights would choose the same ones."""
    given = answers(drawn.rollouts, drawn.length_B1, np.ones(16, bool))
    is_drawn_BT, is_read_BT = given.targets_BT >= 0, given.segments_BT > 0
    is_read_BT = is_read_BT & np.pad(is_read_BT[:, 1:], ((0, 0), (0, 1)))  # no block has read an answer's last token
    routes = given.routes["moe_blocks"]
    assert routes.shape == (16, 14, 2, 2) and routes[is_read_BT].min() == 0 and routes[is_read_BT].max() == 3
    assert (routes[is_read_BT][..., 0] != routes[is_read_BT][..., 1]).all()
    found = [
        np.asarray(learner._measure(placed(learner, state), learner._placed(given._replace(routes=kept))).logp_BT)
        for kept in (given.routes, {}, {"moe_blocks": (routes + 1) % 4})
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2])[is_drawn_BT].max() > 1e-4


@pytest.mark.slow
def test_what_is_drawn_from_a_nucleus_is_learnt_from_over_the_nucleus(learner, state):
    """The ratio of the first update is 1 there as well, which it is not over the whole vocabulary."""
    other = make_learner(learner.rewards, top_p=0.5)
    drawn = other.draw(placed(other, state), asked(*QUESTIONS), row_keys(0, 0, 16), TEMPERATURE)
    given = answers(drawn.rollouts, drawn.length_B1, np.ones(16, bool))
    is_drawn_BT = given.targets_BT >= 0
    n_kept_BT = np.unpackbits(given.kept_BTV, axis=-1).sum(-1)
    assert (n_kept_BT[is_drawn_BT] > 1).any() and n_kept_BT[is_drawn_BT].max() < 272
    found = other._measure(placed(other, state), other._placed(given))
    np.testing.assert_allclose(np.asarray(found.logp_BT), given.sampled_logp_BT, atol=1e-5)
    most_BT = np.log(np.maximum(n_kept_BT, 1))
    assert (np.asarray(found.entropy_BT) <= most_BT + 1e-5)[is_drawn_BT].all(), "that of the nucleus"
    whole = learner._measure(placed(learner, state), learner._placed(given._replace(kept_BTV=given.kept_BTV[..., :0])))
    assert np.abs(np.asarray(whole.logp_BT) - given.sampled_logp_BT)[is_drawn_BT].max() > 0.1
    _, figures = other.step(placed(other, state), state["params"], 0)
    assert figures["gap"] < 1e-5 and figures["skipped"] == 0 and np.isfinite(figures["gradient_norm"])


@pytest.mark.slow
def test_answers_are_those_of_the_generator_and_do_not_depend_on_their_neighbours(learner, state, drawn):
    trainer = learner.trainer
    keys = jax.random.wrap_key_data(row_keys(0, 0, 16))
    prompts = [learner.turns.prompt(problem, "") for problem in drawn.problems]
    generator = Generator(trainer.definition)
    new_BT = generator.generate(
        state["params"], state["router_bias"], prompts[:4], keys[:4],
        max_new_tokens=NEW, n_positions=64, temperature=TEMPERATURE, stop_ids=[257],
    )  # fmt: skip
    for row, expected in enumerate(new_BT):
        begin, count = len(prompts[row]), drawn.rollouts.n_drawn_B1[row, 0]
        ids = drawn.rollouts.ids_BT[row, begin : begin + count]
        assert ids.tolist() == expected[expected != ENDED].tolist()
    others = learner.draw(placed(learner, state), asked(*QUESTIONS[:1], *["77"] * 15), row_keys(0, 0, 16), TEMPERATURE)
    assert others.rollouts.ids_BT[0].tolist() == drawn.rollouts.ids_BT[0].tolist()
    texts = {tuple(row) for row in drawn.rollouts.ids_BT.tolist()}
    assert len(texts) == 16, "answers to the same problem have keys of their own"


def test_an_end_mark_is_a_target_and_what_follows_is_not(drawn):
    """Rows are made up: one ends at once, one after two tokens, one is cut off, one could not be scored.

    Not the value says what follows: padding may be end marks.
    """
    rolled = drawn.rollouts._replace(
        ids_BT=np.array([[1, 2, 257, 257, 257], [1, 8, 9, 257, 0], [1, 2, 5, 6, 7], [1, 2, 5, 257, 0]]),
        logp_BT=np.arange(20.0).reshape(4, 5),
        n_drawn_B1=np.array([[1], [3], [3], [2]]),
        is_finished_B1=np.array([[True], [True], [False], [True]]),
        kept_BTV=np.zeros((4, 5, 0), np.uint8),
        routes={"moe_blocks": np.arange(20).reshape(4, 5, 1, 1)},
    )
    found = answers(rolled, np.array([[2], [1], [2], [2]]), np.array([True, True, True, False]))
    expected = [[-1, 257, -1, -1], [8, 9, 257, -1], [-1, 5, 6, 7], [-1, -1, -1, -1]]
    assert found.targets_BT.tolist() == expected
    assert found.sampled_logp_BT.tolist() == [[0, 2, 0, 0], [6, 7, 8, 0], [0, 12, 13, 14], [0, 0, 0, 0]]
    assert found.routes["moe_blocks"][2, :, 0, 0].tolist() == [10, 11, 12, 13], "of the tokens that are read"
    assert found.segments_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_the_first_update_has_ratio_one_and_the_next_rollout_differs(learner, state):
    class InTurn:
        def score(self, problems, responses):
            return [Score(row % 2, {"accuracy": row % 2}) for row in range(len(problems))]

    before, learner = copy.deepcopy(state), copy.copy(learner)
    learner.rewards = InTurn()
    after, figures = learner.step(placed(learner, state), before["params"], 0)
    assert 0 < figures["gap"] < 1e-5 and 0 < figures["kl"] < 0.1
    other = copy.copy(learner)
    other._measured = lambda *given: learner._measured(*given[:-1], np.arange(16))
    same, expected = other.step(placed(learner, state), before["params"], 0)
    assert figures == pytest.approx(expected, rel=1e-3, abs=1e-6), "also of answers that were not measured before"
    for found, moments in zip(*(jax.tree.leaves(fetched(s["optimizer"]["mu"])) for s in (after, same)), strict=True):
        np.testing.assert_allclose(found, moments, atol=1e-6)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(after["params"]), before["params"])
    assert any(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after["router_bias"]), before["router_bias"])
    keys = row_keys(0, 0, 16)
    again = [learner.draw(s, asked(*QUESTIONS), keys, 1.0).rollouts.logp_BT for s in (placed(learner, before), after)]
    assert np.abs(again[0] - again[1]).max() > 1e-6


@pytest.mark.slow
def test_equal_rewards_move_nothing(begun):
    """Without a divergence: a step leaves every weight as it is. The first block is dense, as in every V3."""

    class Same:
        def score(self, problems, responses):
            return [Score(0.35, {"accuracy": 0.35})] * len(problems)

    learner = make_learner(Same(), beta=0.0, n_dense=1)
    state = jax.device_get(begun(learner.trainer))
    assert len(state["params"]["dense_blocks"]) > 0
    after, figures = learner.step(placed(learner, state), None, 0)
    assert figures["gap"] < 1e-5 and figures["tied"] == 1 and figures["gradient_norm"] == 0 and "kl" not in figures
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after["params"]), state["params"])
    learner.teacher = Teacher(placed(learner, state), learner._measure)
    after, figures = learner.step(placed(learner, state), None, 0)
    assert figures["teacher_kl"] == 0 and figures["gradient_norm"] == 0, "the student is its own teacher"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after["params"]), state["params"])
    other = state | {
        "params": jax.tree.map(lambda x: x + 0.02 * np.sin(np.arange(x.size)).reshape(x.shape), state["params"])
    }
    learner.teacher = Teacher(placed(learner, other), learner._measure)
    _, figures = learner.step(after, None, 0)
    assert figures["teacher_kl"] != 0 and figures["gradient_norm"] > 0 and "tied" not in figures


def loop(learner, workdir, steps, profiles=None):
    """Runs to step `steps`, from the checkpoint of the workdir if there is one."""
    when = LoopConfig(
        steps=steps, log_every=1, eval_every=0, checkpoint_every=1, refresh_every=2, eval_problems=16, max_skipped=3
    )
    with Checkpointer(workdir / "checkpoints") as checkpoints, Metrics(workdir, steps, enabled=False) as metrics:
        kept = {"checkpoints": checkpoints, "metrics": metrics, "meta": {}, "profiles": profiles}
        made = Loop(learner, when, **kept, workdir=workdir)
        made.evaluate = lambda state, step: None
        stored = learner.trainer.stored
        expected = stored | {REFERENCE: stored["params"], TAKEN_AT: stored["step"]}
        if checkpoints.latest() is None:
            start, state = 0, made.begin(learner.trainer.init(0))
        else:
            start, state, _ = checkpoints.restore(expected)
        state, done = made.run(state, start, StopRequest())
        assert checkpoints.wait() and done == steps
        return fetched(state)


def test_a_run_that_is_cut_resumes_with_the_same_bits(learner, tmp_path):
    """The reference, which the checkpoint holds, is refreshed after steps 2 and 4."""
    profiled: list[int] = []
    whole = loop(learner, tmp_path / "whole", 4, SimpleNamespace(before=profiled.append))
    assert profiled == [1, 2, 3, 4]
    for steps in (1, 3, 4):
        cut = loop(learner, tmp_path / "cut", steps)
        assert int(cut[TAKEN_AT]) == steps // 2 * 2
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    assert int(whole["step"]) == 8, "updates"


@pytest.mark.slow
def test_a_run_whose_answers_the_engine_draws_is_the_same(learner, tmp_path, make_engine):
    """Update by update it takes new weights, whose memory the update before took over; resumed, it has the same bits.

    The routes that the updates of this learner read are those of the batch rollout, which must have the same ids.
    """

    def by_engine():
        one, engine = copy.copy(learner), EngineRoller(make_engine, lambda params: params, NEW, learner.turns.end_ids)

        def roll(state, prompts):
            expected, found = learner._roll(state, prompts), engine(state, prompts)
            np.testing.assert_array_equal(found.ids_BT, expected.ids_BT)
            np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=1e-5)
            return found._replace(routes=expected.routes)

        one.sizes, one._roll = dataclasses.replace(learner.sizes, temperature=1.0), roll
        return one

    whole = loop(by_engine(), tmp_path / "whole", 3)
    for steps in (1, 3):
        cut = loop(by_engine(), tmp_path / "cut", steps)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


class Messages:
    """Metrics that keep what is said."""

    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


def test_a_run_warns_of_what_keeps_it_from_learning(learner, tmp_path):
    """Once each; and says at the end whether right answers have become more, whatever lengths have done."""
    when = LoopConfig(
        steps=9, log_every=1, eval_every=0, checkpoint_every=0, refresh_every=0, eval_problems=16, max_skipped=3
    )
    metrics = Messages()
    made = Loop(learner, when, checkpoints=None, metrics=metrics, meta={}, workdir=tmp_path)
    learner.rewards.failures["kind math: no result after 10 s"] += 1
    figures = {"cut_off": 0.6, "tied": 1.0, "unscored": 0.1}
    for step in (1, 2):
        made._check({"skipped_in_row": 2}, figures, step)
    learner.rewards.failures.clear()
    assert len(metrics.said) == 3 and all(text.startswith("warning: step 1: ") for text in metrics.said)
    assert "60% of the answers were cut off after 6 tokens and so are wrong" in metrics.said[0]
    assert "so nothing is learnt" in metrics.said[1] and "kind math: no result after 10 s" in metrics.said[2]
    with pytest.raises(UserError, match="3 updates in a row had a loss or gradient that is not finite"):
        made._check({"skipped_in_row": 3}, figures, 3)
    metrics.said.clear()
    for end, is_said in ((0.14, True), (0.2, False)):
        made._judge(0, {"accuracy": 0.1, "accuracy_error": 0.03, "answer_length": 5.0})
        made._judge(9, {"accuracy": end, "accuracy_error": 0.03, "answer_length": 15.0})
        assert bool(metrics.said) == is_said
        assert not is_said or "was 0.100 and is 0.140: no more than by chance" in metrics.said.pop()


def test_held_out_problems_are_judged(learner, state):
    figures, first = learner.evaluate(placed(learner, state), 20, 0.0)
    again, _ = learner.evaluate(placed(learner, state), 20, 0.0)
    assert figures == again and figures["accuracy_error"] >= 0 and len(first.responses) == 16
    assert figures["cut_off"] > 0.5 and figures["unscored"] == 0


def test_a_prompt_is_never_cut(learner, tmp_path, monkeypatch):
    """Those of a list are looked at before the first step, and whether its answers can be verified."""
    with pytest.raises(UserError, match=r"problem 3 has 11 tokens: expected rl.longest_prompt=9 at most"):
        learner.turns.prompt(asked("12345678")[0], "problem 3")
    rows = [{"prompt": str(n), "answer": "0"} for n in range(8)]
    for bad, message in (({"prompt": "1" * 9}, "has 12 tokens"), ({"kind": "sum"}, "a problem has kind 'sum'")):
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"prompt": "8"} | bad]))
        monkeypatch.setattr(learner, "problems", open_problems(str(path), 0, 0.2))
        with pytest.raises(UserError, match=message):
            learner.check()
    monkeypatch.undo()
    learner.check()


def test_any_mark_at_which_generation_stops_ends_an_answer():
    """Also one that the template does not know; the answer is without it."""
    turns = Turns(ByteTokenizer(), "r1", False, 9, NEW, end_ids=(256,))
    assert turns.end_ids == (256, 257)
    for end in turns.end_ids:
        assert turns.response([*b"<think>a</think>8", end], True).content == "8"
        assert turns.response([*b"8", end], True).n_tokens == 2


def test_a_thought_begins_with_its_mark():
    """Unless the prompt has it, one without is not in the format, though it can be read."""
    for text, thinking, is_in_format in (
        ("<think>a</think>8", False, 1.0),
        ("a</think>8", False, 0.0),
        ("a</think>8", True, 1.0),
    ):
        turns = Turns(ByteTokenizer(), "r1", thinking, 9, 20)
        drawn = ByteTokenizer().encode(text + turns.template.end.text, specials=True)
        response = turns.response(drawn, True)
        assert response.thought == "a" and RULES["format"](asked("1")[0], response) == is_in_format


def test_multi_token_prediction_is_not_trained():
    """It gets no gradient, and would only decay."""
    config = make_config()
    config.model.mtp_depth = 1
    trainer = run.trainer(config, make_mesh(1, 1, jax.devices()[:1]), learnt=learnt)
    assert jax.tree.leaves(trainer.abstract["params"]["mtp"])
    assert not jax.tree.leaves(trainer.abstract["optimizer"]["mu"].get("mtp"))


@pytest.mark.slow
def test_neither_devices_nor_micro_batches_matter(learner, state):
    """The same answers, the same gradients (Adam's first moments), from weights that are stored in shards."""
    with Rewards(WEIGHTS) as rewards:
        other = make_learner(rewards, 2, 1, embed="data", micro_batches=2, rows_at_once=4)
        found = [first_update(one, state) for one in (learner, other)]
    assert (found[0][0] == found[1][0]).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[0][1], found[1][1])
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.matrix
def test_two_processes_that_divide_the_experts_make_the_same_step(learner, state, tmp_path):
    """Each draws and scores its own answers; the loop of draws turns until both have ended. Runs of both resume."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    command = [sys.executable, str(Path(__file__).with_name("shared_out.py")), str(tmp_path / "out.npz")]
    processes = [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(n)}) for n in range(2)]
    expected = jax.tree.leaves(first_update(learner, state))
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    with np.load(tmp_path / "out.npz") as found:
        for one, other in zip([*expected, 2], found.values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def first_update(learner, state):
    """(ids that were drawn, first moments after an update on 8 of the 16 answers, figures)."""
    drawn = learner.draw(placed(learner, state), asked(*QUESTIONS), row_keys(0, 0, 16), TEMPERATURE)
    totals, groups = [n % 3 for n in range(16)], [n // 4 for n in range(16)]
    given, figures = learner._measured(placed(learner, state), state["params"], drawn, totals, groups, np.arange(16))
    rows = np.array([3, 8, 0, 14, 5, 9, 2, 15])
    after, report = learner.trainer.step(
        placed(learner, state), learner._placed(part(given, rows, learner.objective.grpo.aggregation, NEW))
    )
    figures = {name: float(value) for name, value in jax.device_get(report.auxiliary).items()} | figures
    figures |= {f"score {n}": score.total for n, score in enumerate(learner.score(drawn, 16))}
    return drawn.rollouts.ids_BT, fetched(after["optimizer"]["mu"]), figures | {"loss": float(report.loss)}
