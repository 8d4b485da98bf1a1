"""Generation over the cache equals repeated full forward passes, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import on_device
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution, Unstacked, bind, split
from deepseek_jax.models import family
from deepseek_jax.serve.generate import ENDED, Generator, bucket
from deepseek_jax.serve.sampler import row_keys

PROMPTS = ([5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])


def alone(network, i, **options):
    """The continuation of prompt `i` when it is the whole batch."""
    return [int(new_B[0]) for new_B in network.stream([PROMPTS[i]], row_keys(0, 3)[i : i + 1], **options)]


def together(network, **options):
    """The new ids of all prompts, (B, T)."""
    return np.stack(list(network.stream(PROMPTS, row_keys(0, 3), **options)), axis=1)


@pytest.mark.parametrize("i", [0, 2])
def test_greedy_generation_is_the_argmax_of_repeated_forward_passes(network, i):
    ids = list(PROMPTS[i])
    for token in alone(network, i):
        assert token == network.last_logits(ids).argmax()
        ids.append(token)
    assert len(ids) == len(PROMPTS[i]) + 10


@pytest.mark.parametrize("drawing", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_batch_of_ragged_prompts_says_what_each_says_alone(network, drawing):
    assert together(network, **drawing).tolist() == [alone(network, i, **drawing) for i in range(3)]


def test_seeds_are_reproducible_and_differ(network):
    def drawn(seed):
        return [int(new_B[0]) for new_B in network.stream([PROMPTS[0]], row_keys(seed, 1), temperature=1.0)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_sequence_ends_at_its_stop_id_and_the_batch_when_all_have(network):
    free = together(network, temperature=1.0)
    stop = int(free[0, 4])
    stopped = together(network, temperature=1.0, stop_ids=(stop,))
    for row, whole in zip(stopped, free, strict=True):
        n = whole.tolist().index(stop) + 1 if stop in whole else len(whole)
        assert row[:n].tolist() == whole[:n].tolist()
        assert (row[n:] == ENDED).all()
    first = alone(network, 0, temperature=1.0)
    assert alone(network, 0, temperature=1.0, stop_ids=(first[2],)) == first[: first.index(first[2]) + 1]


@pytest.mark.slow
def test_blocks_of_steps_and_chunks_of_prompts_say_what_single_steps_and_whole_prompts_say(network):
    """Whether sequences end at a stop id, with a block or within one, in the first chunk of the prompts or later."""
    in_parts = Generator(network.generator.definition, network.vocab_size, chunk=5, block=4)
    drawing = {"temperature": 1.0, "top_p": 0.9}
    free = together(network, **drawing)
    for stop_ids in ((), (int(free[0, 4]),), (int(free[1, 2]), int(free[0, 5]), int(free[2, 3]))):
        options = {"max_new_tokens": 10, "n_positions": 32, "stop_ids": stop_ids} | drawing
        drawn = in_parts.generate(*network.weights, PROMPTS, row_keys(0, 3), **options)
        assert drawn.tolist() == together(network, stop_ids=stop_ids, **drawing).tolist()


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


def test_the_last_chunk_may_reach_past_the_cache(network):
    in_chunks = Generator(network.generator.definition, network.vocab_size, chunk=9)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 200, 31)]
    drawn = in_chunks.generate(*network.weights, [ids], row_keys(0, 1), max_new_tokens=1, n_positions=32)
    assert drawn.tolist() == [[network.last_logits(ids).argmax()]]


def test_a_step_is_dispatched_before_the_last_one_is_looked_at(network, monkeypatch):
    looked_at, dispatched, step = [], [], network.generator._decode

    class Watched:
        def __init__(self, new_BT):
            self.new_BT = new_BT

        def __array__(self, dtype=None, copy=None):
            looked_at.append(len(dispatched))
            return np.asarray(self.new_BT)

    def watched(*args):
        dispatched.append(None)
        new_BT, state = step(*args)
        return Watched(new_BT), state

    monkeypatch.setattr(network.generator, "_decode", watched)
    together(network)
    assert looked_at == [2, 3, 4, 5, 6, 7, 8, 9, 9]  # of 9 steps; behind the last one nothing is left to dispatch


def test_tokens_come_one_by_one_and_may_be_left_unread(network):
    stream = network.stream([PROMPTS[0]], row_keys(0, 1))
    assert next(stream).shape == (1,)
    stream.close()


def test_all_positions_can_be_used_and_not_one_more(network):
    assert len(alone(network, 2, max_new_tokens=21)) == 21
    with pytest.raises(UserError, match="11 tokens and 22 new ones exceed the 32 positions .* Ask for 21 or fewer"):
        alone(network, 2, max_new_tokens=22)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 32], {}, r"a prompt of 32 tokens fills the 32 positions .* \(the last 16 tokens\)"),
        ([[1] * 99], {}, "a prompt of 99 tokens fills the 32 positions"),
        ([[]], {}, "a prompt is empty"),
        ([], {}, "a prompt is empty"),
        ([[1, 272]], {}, "ids from 1 to 272: expected 0 to 271"),
        ([[-1]], {}, "ids from -1 to -1"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
        ([[1]], {"max_new_tokens": "9"}, "max_new_tokens='9': expected a whole number"),
        ([[1]], {"max_new_tokens": None}, "max_new_tokens=None: expected a whole number"),
        ([[1.5]], {}, r"a prompt is \[1.5\]: expected a list of ids"),
        ([[None]], {}, r"a prompt is \[None\]: expected a list of ids"),
        ([[2**40]], {}, "a prompt with ids from 1099511627776"),
        ([[1]], {"temperature": "warm"}, "temperature='warm'"),
        ([[1]], {"temperature": float("inf")}, "temperature=inf"),
        ([[1]], {"top_p": None}, "top_p=None"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(network, prompts, options, message):
    with pytest.raises(UserError, match=message):
        network.stream(prompts, row_keys(0, 1), **options)


def test_buckets():
    """The largest one is rounded up to whole pages of 64."""
    assert [bucket(n, 300) for n in (1, 32, 33, 64, 200, 257, 300)] == [32, 32, 64, 64, 256, 320, 320]
    assert bucket(5, 8) == 8
