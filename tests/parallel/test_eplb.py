"""Placing replicas of experts: the published example, and laws of any placement."""

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.eplb import device_loads, packed, place, replicated

LOADS = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
PUBLISHED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_the_published_example():
    """Twelve experts in four groups, sixteen slots on eight devices of two nodes."""
    np.testing.assert_array_equal(place(LOADS, 16, 8, n_groups=4, n_nodes=2).expert_LS, PUBLISHED)


def test_packs_and_replicas_by_hand():
    np.testing.assert_array_equal(packed(np.array([[1.0, 7, 3, 4]]), 2), [[1, 0, 3, 2]])  # 7 + 1, 4 + 3
    made = replicated(np.array([[2.0, 9, 4]]), 6)
    np.testing.assert_array_equal(made.expert_LS, [[0, 1, 2, 1, 1, 2]])  # 9, then 4.5, then 4 of 4 and 3
    np.testing.assert_array_equal(made.replica_LS, [[0, 0, 0, 1, 2, 1]])
    np.testing.assert_array_equal(made.count_LE, [[1, 3, 2]])


@pytest.mark.parametrize(("n_groups", "n_nodes"), [(1, 1), (8, 4), (8, 3)])
def test_laws_of_a_placement(n_groups, n_nodes):
    rng = np.random.default_rng(0)
    load_LE = rng.lognormal(sigma=1.0, size=(5, 32)).round(3)
    n_devices, n_slots = (12, 48) if n_nodes == 3 else (16, 48)
    placement = place(load_LE, n_slots, n_devices, n_groups, n_nodes)
    for expert_S, replica_S, count_E in zip(*placement, strict=True):
        np.testing.assert_array_equal(np.bincount(expert_S, minlength=32), count_E)
        assert len(set(zip(expert_S, replica_S, strict=True))) == n_slots and (replica_S < count_E[expert_S]).all()
    loads = device_loads(load_LE, placement, n_devices)
    np.testing.assert_allclose(loads.sum(axis=1), load_LE.sum(axis=1))
    in_order = load_LE.reshape(5, 16, 2).sum(axis=-1)
    assert loads.max() / loads.mean() < in_order.max() / in_order.mean()
    assert device_loads(load_LE, place(load_LE, 32, 16), 16).max() <= in_order.max()
    if n_groups % n_nodes == 0 and n_nodes > 1:
        node_of_slot = np.arange(n_slots) // (n_slots // n_nodes)
        for expert_S in placement.expert_LS:  # a group stays on one node
            groups = {(expert // 4, node) for expert, node in zip(expert_S, node_of_slot, strict=True)}
            assert len(groups) == n_groups


def test_numbers_that_do_not_divide_are_refused():
    for numbers in ((11, 1), (16, 3), (16, 8, 5), (16, 8, 4, 3)):
        with pytest.raises(UserError, match=f"^{numbers[0]} replicas of 12 experts"):
            place(LOADS, *numbers)
