"""ZeRO-1: sums that are scattered, parts that are gathered, a norm that counts every weight once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import zero
from deepseek_jax.parallel.mesh import ALL, make_mesh, per_device
from deepseek_jax.parallel.mesh import place as place_on
from deepseek_jax.parallel.sharding import placements

LOGICAL = {"whole": (None, "mlp"), "odd": (None,), "experts": ("experts", "mlp"), "stored": ("embed", None)}
SHAPES = {"whole": (3, 16), "odd": (5,), "experts": (4, 6), "stored": (2, 3)}


@pytest.fixture(scope="module")
def found() -> dict:
    """What each function makes of the weights W and of gradients (1 + device) * W."""
    mesh = make_mesh(2, 4)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    place = placements(LOGICAL, weights, {"experts": "expert", "embed": "data"}, mesh)
    specs = {name: p.spec for name, p in place.items()}
    parts = {name: p.state_spec for name, p in place.items()}

    def on_device(cut):
        whole = jax.tree.map(zero.gather, cut, place)
        gradients = jax.tree.map(lambda w: (1.0 + jax.lax.axis_index(ALL)) * w, whole)
        return {"summed": zero.sum_and_scatter(gradients, place), "whole": whole}, zero.global_norm(cut, place)

    out = ({"summed": parts, "whole": specs}, P())
    cut = place_on(weights, mesh, parts)
    trees, norm = jax.jit(per_device(on_device, mesh, (parts,), out))(cut)
    return {"weights": weights, "place": place, "norm": norm, "cut": cut, **trees}


def test_parts_make_up_the_whole(found):
    for name, weight in found["weights"].items():
        np.testing.assert_array_equal(found["whole"][name], weight)


def test_a_device_holds_its_part_only(found):
    shard = {name: array.addressable_shards[0].data.shape for name, array in found["cut"].items()}
    assert shard == {"whole": (3, 2), "odd": (5,), "experts": (1, 3), "stored": (1, 3)}


def test_gradients_are_summed_over_the_copies(found):
    """Device d holds d + 1 times the weight; along each axis only those with the same part are added up."""
    factor = np.arange(1, 9).reshape(2, 4)
    np.testing.assert_allclose(found["summed"]["whole"], 36 * found["weights"]["whole"], rtol=1e-6)
    np.testing.assert_allclose(found["summed"]["odd"], 36 * found["weights"]["odd"], rtol=1e-6)
    by_expert = factor.sum(axis=0)[:, None] * found["weights"]["experts"]
    np.testing.assert_allclose(found["summed"]["experts"], by_expert, rtol=1e-6)
    by_data = factor.sum(axis=1)[:, None] * found["weights"]["stored"]
    np.testing.assert_allclose(found["summed"]["stored"], by_data, rtol=1e-6)


def test_the_norm_counts_every_weight_once(found):
    expected = np.sqrt(sum(np.sum(np.float64(w) ** 2) for w in found["weights"].values()))
    assert float(found["norm"]) == pytest.approx(expected, rel=1e-6)
    assert jnp.ndim(found["norm"]) == 0
