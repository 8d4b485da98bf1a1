"""One padded batch gives the text of the engine; layers apart compute what stacked ones do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import on_device
from deepseek_jax.layers.base import Execution, Unstacked, bind, split
from deepseek_jax.models import family
from deepseek_jax.serve.generate import Generator, bucket
from deepseek_jax.serve.offline import complete
from deepseek_jax.serve.sampler import row_keys
from deepseek_jax.serve.sampling import Sampling

PROMPTS = [[5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


PARTS = {"chunk": 5, "block": 4, "ends_early": False}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, pytest.param(PARTS, id="in parts")])
def test_a_padded_batch_gives_the_text_of_the_engine(network, engine, options):
    """Also where sequences end at a stop id, in a block or between two, and prompts are read in parts."""
    generator = Generator(network.definition, **options)
    prompts, limits = [np.array(prompt) for prompt in PROMPTS], {"max_new_tokens": 10, "n_positions": 32}
    free = [one.ids for one in complete(engine(), PROMPTS, [Sampling(10)] * 3)]
    for stop_ids in ((), (free[0][4],), (free[1][2], free[0][5], free[2][3])):
        drawn_BT = generator.generate(*network.weights, prompts, row_keys(0, 3), stop_ids=stop_ids, **limits)
        expected = complete(engine(), PROMPTS, [Sampling(10, stop_ids=stop_ids)] * 3)
        assert [row[row >= 0].tolist() for row in drawn_BT] == [one.ids for one in expected]


@pytest.mark.slow
def test_weights_of_layers_apart_say_what_stacked_ones_say(network):
    """Bit for bit where each layer's are an array of their own; those with axes turned sum in another order."""
    maker, run = family(network.config.family), Execution(unroll=0)
    sizes = maker.Config.from_config(network.config.model)
    definition, *_ = split(nnx.eval_shape(lambda: maker.Model(sizes, run, rngs=nnx.Rngs(0))))
    params, router_bias = network.weights
    turned = on_device.Prepared(network.config, for_gpu=True)(params)
    apart = jax.tree.map(
        lambda w: Unstacked(tuple(jnp.asarray(layer[...]) for layer in w.layers)) if isinstance(w, Unstacked) else w,
        turned,
        is_leaf=lambda w: isinstance(w, Unstacked),
    )

    @jax.jit
    def logits(params):
        model = bind(definition, params, router_bias)
        h_BTD, cache = model.prefill(jnp.array([[5, 9, 200]]), 8)
        return h_BTD, model.decode(jnp.array([[7]]), jnp.array([[3]]), cache)

    stacked = jax.tree.leaves(logits(params))
    for one, same, near in zip(stacked, jax.tree.leaves(logits(apart)), jax.tree.leaves(logits(turned)), strict=True):
        np.testing.assert_array_equal(one, same)
        np.testing.assert_allclose(one, near, atol=1e-5)


def test_buckets():
    """The largest one is rounded up to whole pages of 64."""
    assert [bucket(n, 300) for n in (1, 32, 33, 64, 200, 257, 300)] == [32, 32, 64, 64, 256, 320, 320]
    assert bucket(5, 8) == 8
