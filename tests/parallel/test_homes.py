"""Arrays that the stages of a pipeline share: every stage finds its weights, and no rank has more than it must."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.homes import make_homes
from deepseek_jax.parallel.mesh import make_mesh, per_device

RANKS = 4
# of four leaves, of which two have the form of another: attention and width of a dense layer, of one with experts
FORMS = [(2,), (3,), (2,), (4,)]
DENSE, EXPERTS, BOTH = (True, True, False, False), (False, False, True, True), (True,) * 4
ONE = np.array([[0], [1], [1], [1]])  # the first stage alone has the dense layer
V = np.array([[0, 1], [1, 1], [1, 1], [1, 1]])
MIRRORED = np.array([[0, 1], [1, 1], [1, 1], [1, 0]])  # DualPipe: each copy's first stage


def homes_of(kinds, is_read=(DENSE, EXPERTS)):
    return make_homes(kinds, [jax.ShapeDtypeStruct(shape, np.float32) for shape in FORMS], is_read)


@pytest.mark.parametrize(("kinds", "n_arrays"), [(ONE, 3), (V, 5), (MIRRORED, 5)], ids=["one", "v", "mirrored"])
def test_a_rank_has_as_many_arrays_of_a_form_as_the_rank_that_needs_most(kinds, n_arrays):
    """Attention of one layer per stage, experts of one per stage, and the width of a dense layer once."""
    homes = homes_of(kinds)
    assert len(homes.forms) == n_arrays
    for row in kinds.tolist():
        used = [place for key in enumerate(row) for place in homes.places[key].values()]
        assert len(used) == len({*used})
    for (_, kind), places in homes.places.items():
        assert [n in places for n in range(4)] == list((DENSE, EXPERTS)[kind])
        assert all(homes.forms[place].shape == FORMS[n] for n, place in places.items())


def test_nothing_is_saved_where_all_stages_are_alike():
    assert len(homes_of(np.zeros((RANKS, 1), int), (BOTH,)).forms) == 4


@pytest.mark.parametrize("kinds", [V, MIRRORED], ids=["v", "mirrored"])
def test_stages_find_their_weights_and_sums_return_to_them(kinds):
    homes, n_chunks = homes_of(kinds), kinds.shape[1]
    mesh = make_mesh(1, 1, jax.devices()[:RANKS], RANKS)
    weights = [np.arange(1.0, 1 + RANKS * n_chunks * n, dtype=np.float32).reshape(RANKS, -1, n) for (n,) in FORMS]

    def on_device(weights: list) -> tuple:
        arrays = homes.filled([[a[0, chunk] for a in weights] for chunk in range(n_chunks)])
        found = {key: homes.tree(arrays, key) for key in homes.places}
        back = [homes.of_chunk(arrays, chunk) for chunk in range(n_chunks)]
        return jax.tree.map(lambda a: a[None], (found, back))

    found, back = jax.device_get(jax.jit(per_device(on_device, mesh, P("pipe"), P("pipe")))(weights))
    for rank, row in enumerate(kinds.tolist()):
        for chunk, kind in enumerate(row):
            for n, is_read in enumerate((DENSE, EXPERTS)[kind]):
                known = weights[n][rank, chunk] * is_read
                np.testing.assert_array_equal(found[chunk, kind][n][rank] * is_read, known)
                np.testing.assert_array_equal(back[chunk][n][rank], known)
