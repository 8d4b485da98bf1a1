"""Expert parallelism over four devices against all experts on one, however lopsided the routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.layers.grouped import grouped_swiglu
from deepseek_jax.parallel import alltoall
from deepseek_jax.parallel.alltoall import fill_buffers, on_expert_devices
from deepseek_jax.parallel.mesh import BATCH, EXPERT, make_mesh, per_device, place

M, D, F, E, W = 16, 4, 3, 8, 4  # tokens of a device, widths, experts, devices along `expert`
EXPERTS = P(EXPERT)


def routing(kind: str, top_k: int) -> np.ndarray:
    """Experts of the M * W tokens of one group of devices."""
    token = np.arange(M * W)
    first = {
        "balanced": token % E,
        "a little full": np.where(token % M < 7, 0, 2 + token % 6),
        "all to one device": np.full(M * W, 6),
        "all to one expert, from one device": np.where(token < M, 3, token % E),
        "random": np.random.default_rng(0).integers(0, E, M * W),
    }[kind]
    return np.stack([(first + 5 * k + (kind == "all to one device") * -4 * k) % E for k in range(top_k)], axis=1)


KINDS = ("balanced", "a little full", "all to one device", "all to one expert, from one device", "random")


@functools.cache
def compiled(top_k: int, parallel: bool):
    """(gradients of tokens, factors and experts; y) of a loss summed over the tokens."""

    def one(x_MD, weights_MK, gate_XDF, up_XDF, down_XFD, experts_MK):
        compute = functools.partial(grouped_swiglu, gate_XDF=gate_XDF, up_XDF=up_XDF, down_XFD=down_XFD)
        if parallel:
            y_MD = on_expert_devices(compute, x_MD, experts_MK, weights_MK, n_local=E // W, axis=EXPERT)
        else:
            y_MD = compute(x_MD, experts_MK, weights_MK)
        return jnp.sum(jnp.sin(y_MD + 0.5)), y_MD

    run = jax.grad(one, argnums=(0, 1, 2, 3, 4), has_aux=True)
    if not parallel:
        return jax.jit(run)

    def on_device(*arrays):
        (d_x, d_weights, *d_experts), y = run(*arrays)
        return (d_x, d_weights, *jax.lax.psum(d_experts, "data")), y

    specs = (BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS, BATCH)
    return jax.jit(per_device(on_device, make_mesh(2, W), specs, ((BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS), BATCH)))


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("pair", [(0, 2), (2, 1), (3, 4), (1, 1)], ids=str)
def test_expert_parallel_is_dense_with_all_gradients(pair, top_k):
    """The two rows of the mesh route differently, so that they take different branches at the same time."""
    rng = np.random.default_rng(1)
    experts = np.concatenate([routing(KINDS[i], top_k) for i in pair]).astype(np.int32)
    n_tokens = experts.shape[0]
    shapes = ((n_tokens, D), (n_tokens, top_k), (E, D, F), (E, D, F), (E, F, D))
    inputs = (*(rng.normal(size=shape).astype(np.float32) for shape in shapes), experts)
    specs = (BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS, BATCH)
    expected, y_expected = compiled(top_k, False)(*inputs)
    got, y = compiled(top_k, True)(*place(inputs, make_mesh(2, W), specs))
    np.testing.assert_allclose(y, y_expected, rtol=1e-5, atol=1e-5)
    for here, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(here, right, rtol=1e-5, atol=1e-5 * max(1, np.abs(right).max()))


@functools.cache
def apart(capacity: int):
    """(y with the two halves of the exchange called one by one; the index of the size that would be chosen)."""

    def on_device(x_MD, weights_MK, gate_XDF, up_XDF, down_XFD, experts_MK):
        arrived = alltoall.dispatch(x_MD, experts_MK, weights_MK, n_local=E // W, axis=EXPERT, capacity=capacity)
        y_AD = grouped_swiglu(*arrived[:3], gate_XDF=gate_XDF, up_XDF=up_XDF, down_XFD=down_XFD)
        chosen = alltoall.choose(experts_MK, [5, 8, M], n_local=E // W, axis=EXPERT)
        return alltoall.combine(y_AD, arrived, axis=EXPERT), chosen[None]

    specs = (BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS, BATCH)
    return jax.jit(per_device(on_device, make_mesh(2, W), specs, (BATCH, BATCH)))


def test_the_halves_of_the_exchange_can_be_called_apart():
    """With buffers for the worst case, or for what is known to be enough."""
    rng = np.random.default_rng(1)
    assert alltoall.capacities(M, 1, W) == [5, 8, M]
    for kind, capacity, index in (("all to one device", M, 2), ("balanced", 5, 0)):
        experts = np.concatenate([routing(kind, 1), routing(kind, 1)]).astype(np.int32)
        shapes = ((len(experts), D), (len(experts), 1), (E, D, F), (E, D, F), (E, F, D))
        inputs = (*(rng.normal(size=shape).astype(np.float32) for shape in shapes), experts)
        specs = (BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS, BATCH)
        y, chosen = apart(capacity)(*place(inputs, make_mesh(2, W), specs))
        np.testing.assert_allclose(y, compiled(1, False)(*inputs)[1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(chosen, index)


def test_the_routings_above_need_every_buffer_size():
    """With one expert per token and 16 tokens per device, balance needs 4 rows; the sizes are 5, 8 and 16."""
    fullest = {}
    for kind in KINDS:
        device = (routing(kind, 1)[:, 0] // (E // W)).reshape(W, M)
        fullest[kind] = max(np.bincount(row, minlength=W).max() for row in device)
    assert alltoall.HEADROOM == (1.25, 2.0)
    assert fullest["balanced"] <= 5 < fullest["a little full"] <= 8 < fullest["all to one device"] == 16


def test_buffers_by_hand():
    goes_MW = jnp.array([[True, False], [True, True], [False, True]])
    buffers = fill_buffers(goes_MW, 3)
    np.testing.assert_array_equal(buffers.token_A, [0, 1, 3, 1, 2, 3])  # 3: empty
    np.testing.assert_array_equal(buffers.row_MW, [[0, 6], [1, 3], [6, 4]])  # 6: does not go there
