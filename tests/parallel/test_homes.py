"""Arrays that the stages of a pipeline share: every stage finds its weights, and no rank has more than it must."""

import jax
import jax.numpy as jnp
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
# a dense layer of another width than two experts and one of half their width, which have no leaf of its form
WIDE_FORMS = [(2,), (9,), (2,), (4,), (4,), (2, 1)]
WIDE, NARROW = (True, True, False, False, False, False), (False, False, True, True, True, True)
MIRRORED = np.array([[0, 1], [1, 1], [1, 1], [1, 0]])  # DualPipe: each copy's first stage


def homes_of(kinds, is_read=(DENSE, EXPERTS), forms=FORMS):
    return make_homes(kinds, [jax.ShapeDtypeStruct(shape, np.float32) for shape in forms], is_read)


@pytest.mark.parametrize(("kinds", "n_arrays"), [(ONE, 3), (V, 5), (MIRRORED, 5)], ids=["one", "v", "mirrored"])
def test_a_rank_has_as_many_arrays_of_a_form_as_the_rank_that_needs_most(kinds, n_arrays):
    """Attention of one layer per stage, experts of one per stage, and the width of a dense layer once."""
    homes = homes_of(kinds)
    assert len(homes.forms) == n_arrays
    for row in kinds.tolist():
        used = [place for key in enumerate(row) for lie in homes.places[key].values() for place in lie]
        assert len(used) == len({*used})
    for (_, kind), places in homes.places.items():
        assert [n in places for n in range(4)] == list((DENSE, EXPERTS)[kind])
        assert all(homes.forms[place].shape == FORMS[n] for n, (place,) in places.items())


@pytest.mark.parametrize(("kinds", "n_arrays"), [(ONE, 4), (V, 8), (MIRRORED, 8)], ids=["one", "v", "mirrored"])
def test_what_only_one_stage_has_lies_in_pieces_in_arrays_that_its_rank_does_not_read(kinds, n_arrays):
    homes = homes_of(kinds, (WIDE, NARROW), WIDE_FORMS)
    lies = [homes.forms[place].shape for place in homes.places[0, 0][1]]
    assert lies == [(4,), (4,), (2, 1)] and len(homes.forms) == n_arrays
    for row in kinds.tolist():
        used = [place for key in enumerate(row) for lie in homes.places[key].values() for place in lie]
        assert len(used) == len({*used})


def test_nothing_is_saved_where_all_stages_are_alike():
    assert len(homes_of(np.zeros((RANKS, 1), int), (BOTH,)).forms) == 4


@pytest.mark.parametrize(
    ("kinds", "is_read", "forms"),
    [(V, (DENSE, EXPERTS), FORMS), (ONE, (WIDE, NARROW), WIDE_FORMS), (MIRRORED, (WIDE, NARROW), WIDE_FORMS)],
    ids=["v", "in pieces", "in pieces, mirrored"],
)
def test_stages_find_their_weights_and_sums_return_to_them(kinds, is_read, forms):
    homes, n_chunks = homes_of(kinds, is_read, forms), kinds.shape[1]
    mesh = make_mesh(1, 1, jax.devices()[:RANKS], RANKS)
    sizes = [np.prod(shape) for shape in forms]
    weights = [np.arange(1.0, 1 + RANKS * n_chunks * n, dtype=np.float32) for n in sizes]
    weights = [a.reshape(RANKS, n_chunks, *shape) for a, shape in zip(weights, forms, strict=True)]

    def on_device(weights: list) -> tuple:
        arrays = homes.filled([[a[0, chunk] for a in weights] for chunk in range(n_chunks)])
        found = {key: homes.tree(arrays, key) for key in homes.places}
        zeros = [jnp.zeros_like(a) for a in arrays]
        sums = {key: [a + homes.placed(key, found[key]).get(n, 0) for n, a in enumerate(zeros)] for key in found}
        return jax.tree.map(lambda a: a[None], (found, [homes.of_chunk(arrays, c) for c in range(n_chunks)], sums))

    run = jax.jit(per_device(on_device, mesh, P("pipe"), P("pipe")))
    found, back, sums = jax.device_get(run(weights))
    for rank, row in enumerate(kinds.tolist()):
        for key in enumerate(row):
            of_sums = homes.tree([a[rank] for a in sums[key]], key)
            for n, is_mine in enumerate(is_read[key[1]]):
                known = weights[n][rank, key[0]] * is_mine
                np.testing.assert_array_equal(found[key][n][rank] * is_mine, known)
                np.testing.assert_array_equal(of_sums[n] * is_mine, known)
                np.testing.assert_array_equal(back[key[0]][n][rank], known)
