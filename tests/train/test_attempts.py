"""Steps in buffers of the size that was enough last time: programs that say what they would have needed."""

from types import SimpleNamespace

import numpy as np

from deepseek_jax.train import attempts
from deepseek_jax.train.attempts import Attempts


def subject(made: list) -> Attempts:
    """Its batches are the level that a step needs; a program adds the level of its buffers to the state, if enough."""

    def program(level: int):
        made.append(level)

        def step(state, batch):
            sent = SimpleNamespace(too_small=np.array([batch > 0, batch > 1], np.float32))
            return state + [level] * (level >= batch), SimpleNamespace(sent=sent)

        return step

    return Attempts(program)


def test_a_step_is_run_again_until_its_buffers_are_enough():
    made, state = [], []
    step = subject(made)
    for needed in (0, 2, 1, 0):
        state, _ = step(state, needed)
    assert state == [0, 2, 2, 2] and step.repeated == 1
    assert made == [0, 2]  # the load was known: no attempt at level 1


def test_smaller_buffers_are_tried_after_many_calm_steps(monkeypatch):
    monkeypatch.setattr(attempts, "CALM", 3)
    step, state = subject([]), []
    for needed in (2, 0, 1, 0, 0, 1, 0, 0, 0, 0):
        state, _ = step(state, needed)
    assert state == [2, 2, 2, 2, 1, 1, 1, 1, 1, 0] and step.repeated == 1
