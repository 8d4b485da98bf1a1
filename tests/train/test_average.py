"""The moving average of the weights equals its formula, on any mesh, and goes through checkpoints."""

import contextlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.mesh import make_mesh, place
from deepseek_jax.train.average import MovingAverage
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.loop import Loop
from deepseek_jax.train.phases import Phases

SPECS = {"cut": P(("data", "expert")), "whole": P()}


def weights(step: int, mesh) -> dict:
    rng = np.random.default_rng(step)
    return place({"cut": rng.normal(size=(8, 3)).astype("f"), "whole": rng.normal(size=5).astype("f")}, mesh, SPECS)


def trained(average: MovingAverage, mesh, steps: range) -> dict:
    """The average after these steps, of which 3 is skipped; the weights given are donated, as a step does."""
    free = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    for step in steps:
        params = weights(step, mesh)
        average.add(params, jnp.float32(step != 3))
        free(params)
    return jax.device_get(average.params())


@pytest.fixture(scope="module")
def one_device() -> dict:
    mesh = make_mesh(1, 1, jax.devices()[:1])
    return trained(MovingAverage(0.75, weights(0, mesh)), mesh, range(1, 6))


def test_it_is_the_formula_and_skipped_steps_do_not_count(one_device):
    mesh = make_mesh(1, 1, jax.devices()[:1])
    expected = jax.device_get(weights(0, mesh))
    for step in (1, 2, 4, 5):
        w = jax.device_get(weights(step, mesh))
        expected = {name: 0.75 * a + 0.25 * w[name] for name, a in expected.items()}
    for name, a in expected.items():
        np.testing.assert_allclose(one_device[name], a, rtol=1e-6, atol=1e-7)


def test_saved_after_two_steps_and_continued_on_another_mesh_it_is_the_same_to_the_bit(one_device, tmp_path):
    first, second = make_mesh(2, 1, jax.devices()[:2]), make_mesh(2, 4)
    average = MovingAverage(0.75, weights(0, first))
    trained(average, first, range(1, 3))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights(0, second))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(2, {"step": jnp.int32(2), "ema": average.params()})
        checkpoints.save(3, {"step": jnp.int32(3)})
        step = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=like["whole"].sharding)}
        _, stored, _ = checkpoints.restore(step | {"ema": like}, 2, optional=("ema",))
        assert "ema" not in checkpoints.restore(step | {"ema": like}, 3, optional=("ema",))[1]
        assert "ema" not in checkpoints.restore(step, 2, optional=("ema",))[1]
    found = trained(MovingAverage(0.75, stored["ema"]), second, range(3, 6))
    jax.tree.map(np.testing.assert_array_equal, found, one_device)


def test_a_save_leaves_the_state_that_goes_into_the_next_step_as_it_is():
    state, saved = {"params": {"w": 1.0}}, []
    trainer = SimpleNamespace(store=lambda state: state)  # as without a pipeline
    checkpoints = SimpleNamespace(save=lambda step, stored, meta: saved.append(stored))
    average, metrics = SimpleNamespace(params=lambda: {"w": 2.0}), SimpleNamespace(paused=contextlib.nullcontext)
    parts = {"trainer": trainer, "checkpoints": checkpoints, "average": average, "metrics": metrics}
    loop: Any = SimpleNamespace(**parts, meta={}, phases=Phases(), ledger=None)
    Loop.save(loop, 1, state)
    assert saved == [{"params": {"w": 1.0}, "ema": {"w": 2.0}}] and state == {"params": {"w": 1.0}}
