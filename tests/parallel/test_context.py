"""Sequences divided over devices: the order, its balance, which process reads what; attention equals that of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.base import Execution, bind
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.indexer import IndexerConfig
from deepseek_jax.layers.mla import MLA, MLAConfig
from deepseek_jax.layers.mtp import shift_left
from deepseek_jax.layers.sparse_mla import SparseMLA
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.context import Context, zigzag
from deepseek_jax.parallel.mesh import BATCH, batch_share, global_batch, make_mesh, per_device, total

N, B, T, D = 4, 2, 32, 16
LATENT = MLAConfig(
    n_heads=2, q_rank=8, kv_rank=8, nope_width=8, rope_width=4, value_width=6, rope_base=1e4, yarn=None, init_std=0.3
)
GROUPED = GQAConfig(n_heads=4, n_kv_heads=2, head_width=6, init_std=0.3)
INDEX = IndexerConfig(index_heads=3, index_width=8, index_top_k=5, q_rank=8, init_std=0.3)


def test_a_device_holds_an_early_and_a_late_chunk():
    assert zigzag(16, 4).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert zigzag(7, 1).tolist() == list(range(7))
    with pytest.raises(
        UserError, match=r"seq_len=20 does not divide into 2 x config.mesh.context=4 = 8 chunks. Choose"
    ):
        zigzag(20, 4)


def test_every_chunk_visits_all_before_it_and_none_after():
    mesh = make_mesh(1, 1, jax.devices()[:N], context=N)
    context = Context(N)

    def visits(_: jax.Array) -> jax.Array:
        at = jax.vmap(context.visit)(jnp.arange(context.n_visits))
        rank = jnp.full_like(at.mine, jax.lax.axis_index("context"))
        return jnp.stack([rank, *at], axis=1)[None]

    run = jax.jit(per_device(visits, mesh, P("context"), P("context")))
    chunks = zigzag(2 * N, N).reshape(N, 2)
    found = [(chunks[rank, mine], chunks[device, half]) for rank, mine, device, half in np.vstack(run(np.arange(N)))]
    assert sorted(found) == [(q, k) for q in range(2 * N) for k in range(q)]


def test_the_next_token_may_be_on_another_device():
    mesh, rows = make_mesh(1, 1, jax.devices()[:N], context=N), np.arange(2 * T).reshape(2, T)
    shift = functools.partial(shift_left, fill=-1, context=Context(N))
    got = jax.jit(per_device(shift, mesh, BATCH, BATCH))(global_batch(rows, mesh))
    expected = np.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    np.testing.assert_array_equal(got, expected[:, zigzag(T, N)])


@pytest.mark.parametrize(
    ("n_processes", "shape", "expected"),
    [
        (2, (1, 2, 2, 2), [(0, 2), (1, 2)]),
        (4, (1, 2, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (8, (1, 1, 4, 2), [(0, 2), (1, 2)] * 4),
        (4, (2, 2, 1, 2), [(0, 2), (1, 2)] * 2),
        (8, (1, 4, 1, 2), [(i, 8) for i in range(8)]),
    ],
)
def test_processes_that_share_sequences_read_the_same(monkeypatch, n_processes, shape, expected):
    pipe, data, context, expert = shape
    mesh = make_mesh(data, expert, pipe=pipe, context=context)
    monkeypatch.setattr(meshes.jax, "process_count", lambda: n_processes)
    found = []
    for index in range(n_processes):
        monkeypatch.setattr(meshes.jax, "process_index", lambda index=index: index)
        found.append(batch_share(mesh))
    assert found == expected


def test_processes_that_hold_parts_of_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(meshes.jax, "process_count", lambda: 3)
    with pytest.raises(
        UserError, match="context=2 x expert=3 with 4 devices per process: .* whole ranks along context"
    ):
        make_mesh(2, 3, [None] * 12, context=2)


def text() -> tuple:
    """(x_BTD, gradient of the result, positions, documents) of two packed sequences."""
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    cut, index = np.array([[9], [20]]), np.arange(T)[None]
    positions = np.where(index < cut, index, index - cut).astype(np.int32)
    return x, g, positions, np.where(index < cut, 1, 2).astype(np.int32)


def loss(definition, params, x_BTD, g_BTD, positions_BT, segments_BT):
    """Of the output and of all losses that the layer reports, these beside it."""
    attention = bind(definition, params, {})
    tokens, x = Tokens(positions_BT, positions_BT, segments_BT), attention.operand(x_BTD)
    out_BTD, losses = attention.over_itself(x, tokens, attention.entries(x, tokens))
    return jnp.sum(g_BTD * out_BTD) + sum(losses.values()), losses


def sparse(sizes, d_model, run, *, rngs):
    return SparseMLA(sizes, INDEX, d_model, run, rngs=rngs)


def warm_up(sizes, d_model, run, *, rngs):
    return SparseMLA(sizes, INDEX, d_model, run, is_dense=True, rngs=rngs)


@pytest.mark.parametrize(
    ("layer", "sizes", "name"),
    [
        (MLA, LATENT, "xla"),
        (MLA, LATENT, "reference"),
        (GQA, GROUPED, "chunked"),
        (sparse, LATENT, "xla"),
        pytest.param(warm_up, LATENT, "xla", marks=pytest.mark.matrix),
    ],
)
def test_attention_of_divided_sequences_is_that_of_whole_ones(layer, sizes, name, filled):
    mesh, order, given = make_mesh(1, 2, context=N), zigzag(T, N), text()

    def network(**options) -> tuple:
        return filled(lambda: layer(sizes, D, Execution(**options), rngs=nnx.Rngs(0)), std=0.3)[:2]

    definition, params = network()
    whole = jax.jit(jax.value_and_grad(functools.partial(loss, definition), (0, 1), has_aux=True))
    (value, losses), (d_params, dx) = whole(params, *given)
    divided, _ = network(context=Context(N), kernels=Kernels(attention=name))

    def on_device(params, *here):
        subject = jax.value_and_grad(functools.partial(loss, divided), (0, 1), has_aux=True)
        found, (d_params, dx) = subject(params, *here)
        return total((found, d_params)), dx

    specs = (P(), *[BATCH] * 4), ((P(), P()), BATCH)
    ((got, losses_got), d_got), dx_got = jax.jit(per_device(on_device, mesh, *specs))(
        params, *(a[:, order] for a in given)
    )
    assert float(got) == pytest.approx(float(value), rel=1e-5)
    assert (losses != {}) == (layer in (sparse, warm_up))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), losses_got, losses)
    np.testing.assert_allclose(dx_got, np.asarray(dx)[:, order], atol=2e-6 * np.abs(dx).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()), d_got, d_params)


def test_cudnn_is_refused():
    from deepseek_jax.layers.divided_attention import implementation

    with pytest.raises(
        UserError, match="attention='cudnn' attends to whole sequences only.* Choose one of chunked, .*mesh.context=1"
    ):
        implementation("cudnn")


def test_a_pipeline_divides_no_sequences():
    with pytest.raises(UserError, match="pipe=2 x data=1 x context=2 x expert=1: .* Set pipe or context to 1"):
        make_mesh(1, 1, pipe=2, context=2)
