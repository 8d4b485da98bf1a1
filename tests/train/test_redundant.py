"""Redundant experts change where tokens go, and nothing else: evaluation, generation, the balance of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution, bind, logical_axes, split
from deepseek_jax.layers.experts import _slots
from deepseek_jax.models import family
from deepseek_jax.parallel.eplb import place, slots
from deepseek_jax.parallel.mesh import global_batch
from deepseek_jax.train.redundant import RedundantEvaluator, imbalance, placed, with_replicas
from tests.train.test_step import EXPERTS, V, batch, start, trainer

LOADS = {  # two experts with most of the tokens, others in each layer
    "moe_blocks": np.array([[90, 80, 5, 5, 5, 5, 5, 5], [5, 5, 5, 70, 5, 5, 60, 5]]),
    "mtp": {"0": np.array([5, 5, 5, 5, 5, 5, 5, 100])},
}


@pytest.fixture(scope="module")
def sizes(tiny_sizes):
    sizes = tiny_sizes.copy_and_resolve_references()
    sizes.update(n_layers=2, n_dense_layers=0)
    return family("v3").Config.from_config(sizes)


@pytest.fixture(scope="module")
def weights(sizes, filled) -> tuple:
    return filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)), std=0.1)[1:]


@pytest.mark.slow
def test_held_out_text_has_the_same_loss(sizes, weights):
    """Twelve replicas on four devices, weights in shards; the one-device network has one of each."""
    lengths, text = jnp.arange(V) % 3, batch(3)
    one, many = trainer(sizes, 1, 1, EXPERTS), trainer(sizes, 2, 4, EXPERTS | {"embed": "data"})
    known = one.evaluator(lengths)(start(one, weights), global_batch(text, one.mesh))
    evaluate = RedundantEvaluator(many, lengths, 4)
    where = evaluate.placed(LOADS)
    replicas = evaluate.weights(start(many, weights), where)
    gate = replicas[0]["moe_blocks"]["experts"]["gate_XDF"]
    assert gate.shape[1] == 12 and gate.addressable_shards[0].data.shape[1] == 3
    np.testing.assert_allclose(evaluate(replicas, global_batch(text, many.mesh)), known, rtol=1e-5)
    before, after = imbalance(LOADS, where, 4)
    assert after < 0.25 * before


@pytest.mark.slow
def test_generation_is_the_same(sizes, weights):
    """The logits of a prompt and of a token after it, on one device: replicas take turns and are equal."""
    found = []
    for run in (Execution(), Execution(redundant=3)):
        definition = split(nnx.eval_shape(lambda run=run: family("v3").Model(sizes, run, rngs=nnx.Rngs(0))))[0]
        params, biases = weights
        if run.redundant:
            axes = logical_axes(nnx.eval_shape(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0))))[0]
            params, biases = with_replicas(params, biases, axes, placed(LOADS, 3, 1))

        def generate(params, biases, definition=definition):
            model = bind(definition, params, biases)
            ids = jnp.arange(2 * 9).reshape(2, 9)
            logits, cache = model.prefill(ids, 16)
            return logits, model.decode(ids[:, :1], jnp.full((2, 1), 9), cache)[0]

        found.append(jax.jit(generate)(params, biases))
    for plain, redundant in zip(*found, strict=True):
        np.testing.assert_allclose(redundant, plain, rtol=1e-5, atol=1e-6)
        assert np.abs(plain).max() > 0.1


def test_replicas_take_turns():
    placement = place(LOADS["moe_blocks"], 12, 4)
    slot_LER = slots(placement)
    experts_MK = np.tile([[0, 5]], (40, 1))
    experts_MK[::4] = 8  # padding
    for slot_ER, expert_S, count_E in zip(slot_LER, placement.expert_LS, placement.count_LE, strict=True):
        found = np.asarray(_slots(jnp.asarray(experts_MK), jnp.asarray(slot_ER)))
        assert (found[::4] == 12).all()
        rest = found[np.arange(40) % 4 > 0]
        assert (expert_S[rest] == [0, 5]).all()
        used, tokens = np.unique(rest[:, 0], return_counts=True)
        assert len(used) == count_E[0] and np.ptp(tokens) <= 10


def test_what_cannot_be_is_refused(sizes):
    with pytest.raises(
        UserError, match="3 redundant experts over 4 devices: .* Set config.loop.eval_redundant to a multiple of 4"
    ):
        RedundantEvaluator(trainer(sizes, 1, 4, EXPERTS), jnp.ones(V), 3)
    from tests.train.test_pipelined import trainer as of_pipeline

    with pytest.raises(UserError, match=r"redundant experts in a pipeline.*Set config.loop.eval_redundant=0"):
        RedundantEvaluator(of_pipeline(sizes, 2, 1, 1, "1f1b", 2), jnp.ones(V), 4)
