"""Attention on Hopper: which blocks are visited, and the kernels interpreted on a CPU against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_attention import attention, gpu, gpu_backward, gpu_forward, reference, visits

needs_interpreter = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="needs JAX 0.11.2 or later")


def seen_blocks(sizes, tiles, segments, q_offset) -> tuple[np.ndarray, np.ndarray]:
    """Whether some pair, and whether every pair of a tile of queries and one of keys is visible, by looking at all."""
    (t, s), (rows, keys) = sizes, tiles
    seen = np.arange(s)[None] <= np.arange(t)[:, None] + q_offset
    if segments is not None:
        seen &= segments[0][0][:, None] == segments[1][0][None]
    some = np.pad(seen, ((0, -t % rows), (0, -s % keys)))
    every = np.pad(np.pad(seen, ((0, -t % rows), (0, 0)), mode="edge"), ((0, 0), (0, -s % keys)))
    blocks = (some.reshape(-(-t // rows), rows, -1, keys), every.reshape(-(-t // rows), rows, -1, keys))
    return blocks[0].any(axis=(1, 3)), blocks[1].all(axis=(1, 3))


@pytest.mark.parametrize("q_offset", [0, 37, -9])
@pytest.mark.parametrize("documents", [False, True])
def test_every_visible_block_is_visited_and_no_hidden_pair_goes_unmasked(q_offset, documents):
    sizes, tiles = (50, 83), (8, 4)
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (1, 83)))
    segments = (ids[:, 33:], ids) if documents else None
    some, every = seen_blocks(sizes, tiles, segments, q_offset)
    for find, matrix in ((visits.visits_of_queries, (some, every)), (visits.visits_of_keys, (some.T, every.T))):
        found = jax.jit(find, static_argnums=(0, 1, 3))(sizes, tiles, segments, q_offset)
        for (first, whole_from, whole_to, end), visible, whole in zip(np.asarray(found)[0], *matrix, strict=True):
            block = np.arange(len(visible))
            assert first < end and first <= whole_from <= whole_to <= end
            assert not visible[(block < first) | (block >= end)].any()
            assert whole[whole_from:whole_to].all()
            assert visible[first:end].sum() == visible.sum() and (whole.sum() <= whole_to - whole_from or documents)


def test_jobs_are_divided_evenly_and_completely():
    costs = np.arange(32) + 2.0
    table = np.asarray(visits.jobs(costs.tolist(), 128, 132))
    mine = [row[1 : 1 + row[0]] for row in table]
    assert sorted(np.concatenate(mine)) == list(range(32 * 128))
    loads = [costs[numbers % 32].sum() for numbers in mine]
    assert max(loads) < 1.01 * np.mean(loads)


def inputs(b, t, s, h, z, width, v_width) -> tuple:
    rng = np.random.default_rng(1)
    shapes = (b, t, h, width), (b, s, z, width), (b, s, z, v_width), (b, t, h, v_width)
    return tuple(jax.device_put(np.asarray(rng.normal(size=shape), jnp.bfloat16)) for shape in shapes)


def expected(q, k, v, do, segments, q_offset, scale) -> tuple:
    """(o, lse, delta, dq, dk, dv) of the definition in float32."""
    define = functools.partial(reference.attention, scale=scale, segments=segments, q_offset=q_offset)
    (o, lse), pull = jax.vjp(define, *(x.astype(jnp.float32) for x in (q, k, v)))
    do = do.astype(jnp.float32)
    return o, lse, jnp.einsum("BTHU,BTHU->BHT", do, o), *pull((do, jnp.zeros_like(lse)))


def error(found, right) -> float:
    found, right = (np.asarray(x, np.float32) for x in (found, right))
    return np.linalg.norm(found - right) / np.linalg.norm(right)


CASES = {
    "V3's widths, two tiles": ((1, 200, 200, 1, 1, 192, 128), 0, False),
    "documents, grouped heads, later queries, odd lengths": ((2, 70, 200, 2, 1, 128, 64), 130, True),
    "queries that see nothing": ((1, 150, 150, 1, 1, 64, 64), -20, False),
}


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_forward_pass_is_the_definition(case):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    sizes, q_offset, documents = CASES[case]
    q, k, v, do = inputs(*sizes)
    segments = ids_of(sizes) if documents else None
    right = expected(q, k, v, do, segments, q_offset, 0.1)
    if sizes[0] > 1:  # no sequence reads what lies behind it
        q, k, v = (x.at[1].set(jnp.nan) for x in (q, k, v))
    o, lse = gpu_forward.forward(
        q, k, v, segments, q_offset, scale=0.1, n_processors=2, interpret=plgpu.InterpretGPUParams()
    )
    assert error(o[0], right[0][0]) < 3e-3
    np.testing.assert_allclose(lse[0], right[1][0], atol=1e-5)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_definition(case):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    sizes, q_offset, documents = CASES[case]
    q, k, v, do = inputs(*sizes)
    segments = ids_of(sizes) if documents else None
    _, lse, delta, *right = expected(q, k, v, do, segments, q_offset, 0.1)
    if sizes[0] > 1:
        q, k, v, do = (x.at[1].set(jnp.nan) for x in (q, k, v, do))
    found = []
    for of_keys in (False, True):
        found += gpu_backward.backward(
            q, k, v, segments, q_offset, lse, do, delta,
            scale=0.1, of_keys=of_keys, n_processors=2, interpret=plgpu.InterpretGPUParams(),
        )  # fmt: skip
    for gradient, of_definition in zip(found, right, strict=True):
        assert error(gradient[0], of_definition[0]) < 6e-3


def ids_of(sizes) -> tuple:
    b, t, s = sizes[:3]
    ids = jax.device_put(np.asarray(np.sort(np.random.default_rng(2).integers(0, 4, (b, s))), jnp.int32))
    return ids[:, s - t :], ids


@pytest.mark.parametrize(
    ("dtype", "widths", "scale", "message"),
    [
        (jnp.float32, (192, 128), 0.1, "q, k, v are float32"),
        (jnp.bfloat16, (96, 64), 0.1, "96 wide"),
        (jnp.bfloat16, (256, 128), 0.1, "at most 320"),
        (jnp.bfloat16, (64, 64), -1.0, "expected a positive number"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(dtype, widths, scale, message):
    q, v = (jax.ShapeDtypeStruct((1, 8, 1, width), dtype) for width in widths)
    with pytest.raises(ValueError, match=message):
        gpu.check(q, v, scale)


@pytest.mark.parametrize(("n", "copied"), [(1, 1), (7, 7), (8, 8), (9, 16), (777, 784), (4096, 4096)])
def test_matrices_end_where_copies_can_end(n, copied):
    """Swizzled copies refuse lengths above 8 that are no multiple of 8; the interpreter does not."""
    assert gpu_forward.tokens(n) == copied
    assert gpu_forward.whole_tiles(jnp.ones((1, n, 1, 2))).shape == (1, copied, 1, 2)


def test_clusters_from_4096_queries_without_documents():
    assert [gpu_forward.choose(*call).cluster for call in [(4096, False), (4096, True), (4095, False)]] == [2, 1, 1]


def test_gradients_in_a_branch_inside_shard_map_are_traced(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "check_hopper", lambda name: 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = jax.sharding.PartitionSpec("x")

    def total(q, k, v, branch):
        attend = functools.partial(attention, implementation="mosaic_gpu", scale=0.1)
        branches = (lambda q, k, v: attend(q, k, v)[0]), (lambda q, k, v: v)
        return jax.lax.switch(branch[0], branches, q, k, v).astype(jnp.float32).sum()

    gradients = jax.shard_map(jax.grad(total, (0, 1, 2)), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    q, k, v, _ = inputs(2, 9, 9, 1, 1, 64, 64)
    found = jax.eval_shape(gradients, q, k, v, jnp.zeros(2, jnp.int32))
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


def test_a_machine_without_hopper_is_refused():
    q, k, v, _ = inputs(1, 8, 8, 1, 1, 64, 64)
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        attention(q, k, v, implementation="mosaic_gpu", scale=0.1)


@pytest.mark.parametrize("kernel", [gpu_forward, gpu_backward])
def test_one_stage_is_refused(kernel):
    with pytest.raises(ValueError, match="stages=1: expected at least 2"):
        kernel.Tuning(stages=1)
