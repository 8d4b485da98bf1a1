"""Embedding and cross-entropy with the vocabulary over four devices: those of one device, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.layers.embed import rows
from deepseek_jax.parallel.mesh import PIPE, make_mesh, per_device
from deepseek_jax.parallel.sharding import placements
from deepseek_jax.parallel.vocabulary import WHOLE, Vocabulary
from deepseek_jax.train.cross_entropy import cross_entropy

V, D, M, RANKS = 24, 8, 10, 4


def loss(table_VD: jax.Array, weight_DV: jax.Array, ids_M: jax.Array, targets_M: jax.Array, vocabulary: Vocabulary):
    h_MD = jnp.tanh(rows(table_VD, ids_M, vocabulary))
    weights_M = jnp.linspace(0.5, 1.5, M)
    return cross_entropy(h_MD, weight_DV, targets_M, weights_M, 4, vocabulary)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_and_both_gradients_are_those_of_one_device(dtype):
    rng = np.random.default_rng(0)
    table_VD, weight_DV = (jax.device_put(np.asarray(rng.normal(size=shape), dtype)) for shape in ((V, D), (D, V)))
    ids_M, targets_M = rng.integers(-1, V, (2, M), np.int32)  # some read nothing, some have no target
    ids_M[:3] = 5  # a row that is read often
    expected = jax.value_and_grad(loss, (0, 1))(table_VD, weight_DV, ids_M, targets_M, WHOLE)

    run = functools.partial(jax.value_and_grad(loss, (0, 1)), vocabulary=Vocabulary(PIPE))
    split = (P(PIPE), P(None, PIPE))
    mesh = make_mesh(1, 1, jax.devices()[:RANKS], RANKS)
    found = jax.jit(per_device(run, mesh, (*split, P(), P()), (P(), split)))(table_VD, weight_DV, ids_M, targets_M)
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        here, there = np.float32(here), np.float32(there)
        assert np.abs(here - there).max() <= tolerance * np.abs(there).max()
        assert np.abs(there).max() > 0.1


def test_a_pipeline_splits_the_vocabulary_and_refuses_another_split():
    mesh = make_mesh(2, 1, jax.devices()[:4], 2)
    axes, shape = {"table_VD": ("vocab", "embed")}, {"table_VD": jax.ShapeDtypeStruct((V, D), jnp.float32)}
    place = placements(axes, shape, {"embed": "data"}, mesh)["table_VD"]
    assert place.spec == P(PIPE, None) and place.copies == ("data",) and not place.is_sharded
    with pytest.raises(UserError, match=r"table_VD: config.sharding.vocab='data' in a pipeline.*Set"):
        placements(axes, shape, {"vocab": "data"}, mesh)
    odd = {"table_VD": jax.ShapeDtypeStruct((V + 1, D), jnp.float32)}
    with pytest.raises(UserError, match=r"25 vocab over mesh axis 'pipe' of size 2: not divisible"):
        placements(axes, odd, {}, mesh)
