"""Expert parallelism over four devices against all experts on one, however lopsided the routing, in one hop or two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.grouped import grouped_swiglu
from deepseek_jax.parallel import alltoall
from deepseek_jax.parallel.alltoall import Exchange, fill_buffers, make_exchange
from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.mesh import BATCH, EXPERT, SEQUENCES, make_mesh, per_device, place
from deepseek_jax.precision.wire import AS_IS, Codes
from deepseek_jax.run import check_exchange

M, D, F, E, W = 16, 4, 3, 8, 4  # tokens of a device, widths, experts, devices along `expert`
EXPERTS = P(EXPERT)
LAST = len(alltoall.HEADROOM) - 1
SPECS = (BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS, BATCH)


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


def inputs(pair: tuple[str, str], top_k: int, dtype: type = np.float64) -> tuple:
    rng = np.random.default_rng(1)
    experts = np.concatenate([routing(kind, top_k) for kind in pair]).astype(np.int32)
    shapes = ((len(experts), D), (len(experts), top_k), (E, D, F), (E, D, F), (E, F, D))
    return (*(rng.normal(size=shape).astype(dtype) for shape in shapes), experts)


def layer(exchange: Exchange | None, wire, x_MD, weights_MK, gate_XDF, up_XDF, down_XFD, experts_MK):
    """(y_MD, report) of the experts, as `layers.experts` uses the exchange."""
    compute = functools.partial(grouped_swiglu, gate_XDF=gate_XDF, up_XDF=up_XDF, down_XFD=down_XFD)
    here = x_MD, experts_MK, weights_MK
    if exchange is None:
        return alltoall.on_this_device(compute, *here, wire=wire), alltoall.nothing_sent()
    plan = exchange.plan(*experts_MK.shape, E // W)
    sent = plan.report(*here, wire)
    if plan.given is None:
        return alltoall.on_expert_devices(compute, *here, plan, sent, wire), sent
    arrived = alltoall.dispatch(*here, plan=plan, sizes=plan.given, wire=wire)
    return alltoall.combine(compute(*arrived[:3], plan.given.computed), arrived, wire=wire), sent


@functools.cache
def program(exchange: Exchange | None, wire=AS_IS):
    """A function for (gradients of tokens, factors and experts; (y, report)) of a loss summed over the tokens."""

    def one(*arrays):
        y_MD, sent = layer(exchange, wire, *arrays)
        return jnp.sum(jnp.sin(y_MD + 0.5)), (y_MD, sent)

    run = jax.grad(one, argnums=(0, 1, 2, 3, 4), has_aux=True)
    if exchange is None:
        return jax.jit(run)

    def on_device(*arrays):
        (d_x, d_weights, *d_experts), (y, sent) = run(*arrays)
        gathered = jax.tree.map(lambda a: a[None], sent)
        return (d_x, d_weights, *jax.lax.psum(d_experts, "data")), (y, gathered)

    out_specs = ((BATCH, BATCH, EXPERTS, EXPERTS, EXPERTS), (BATCH, P(SEQUENCES)))
    return jax.jit(per_device(on_device, make_mesh(2, W), SPECS, out_specs))


def check_same(found: tuple, expected: tuple, tolerance: float) -> None:
    (got, (y, _)), (known, (y_known, _)) = found, expected
    for here, right in zip((y, *got), (y_known, *known), strict=True):
        np.testing.assert_allclose(here, right, rtol=tolerance, atol=tolerance * max(1, np.abs(right).max()))


def run(exchange: Exchange | None, arrays: tuple, wire=AS_IS) -> tuple:
    if exchange is not None:
        arrays = place(arrays, make_mesh(2, W), SPECS)
    return jax.device_get(program(exchange, wire)(*arrays))


MARKS = {(1, 1): [pytest.mark.slow, pytest.mark.matrix], (1, 3): [pytest.mark.slow]}  # programs of their own
CASES = [
    pytest.param(groups, top_k, pair, marks=MARKS.get((groups, top_k), []), id=f"{groups}-{top_k}-{pair}")
    for groups, top_k in ((1, 1), (1, 3), (2, 3))
    for pair in [(0, 2), (2, 1), (3, 4), (1, 1)]
]


@pytest.mark.parametrize(("groups", "top_k", "pair"), CASES)
def test_expert_parallel_is_dense_with_all_gradients(groups, top_k, pair):
    """The two rows of the mesh route differently, so that they take different branches at the same time."""
    with jax.enable_x64(True):
        arrays = inputs(tuple(KINDS[i] for i in pair), top_k)
        check_same(run(Exchange(EXPERT, W, groups), arrays), run(None, arrays), 1e-12)


def ragged_by_definition(rows, output, begin_W, sent_W, there_W, received_W, *, axis_name, axis_index_groups):
    """jax.lax.ragged_all_to_all as its documentation defines it, which XLA does not have for CPUs."""
    del received_W
    groups = axis_index_groups or [list(range(jax.lax.axis_size(axis_name)))]
    order = {peer: i for group in groups for i, peer in enumerate(group)}
    place = jnp.asarray([order[i] for i in range(len(order))])[jax.lax.axis_index(axis_name)]
    gathered = [jax.lax.all_gather(a, axis_name, axis_index_groups=groups) for a in (rows, begin_W, sent_W, there_W)]
    for theirs, begin, n_rows, there in zip(*gathered, strict=True):
        i = jnp.arange(len(output)) - there[place]
        taken = jnp.take(theirs, begin[place] + i, axis=0, mode="fill", fill_value=0)
        output = jnp.where(((i >= 0) & (i < n_rows[place]))[:, None], taken, output)
    return output


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_ragged_exchange_gives_the_same_and_says_what_it_sends(groups, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_definition)
    with jax.enable_x64(True):
        arrays = inputs(("random", "a little full"), 3)
        ragged = run(Exchange(EXPERT, W, groups, LAST, "ragged"), arrays)
        padded = run(Exchange(EXPERT, W, groups), arrays)
        check_same(ragged, padded, 1e-14)
        sent, most = (found[1][1] for found in (ragged, padded))
        assert sent.within.sum() + sent.across.sum() < most.within.sum() + most.across.sum()


def test_a_ragged_exchange_is_refused_on_cpus():
    config = ConfigDict({"exchange": {"kind": "ragged"}})
    with pytest.raises(UserError, match="exchange.kind='ragged' on CPUs.*exchange.kind=padded"):
        check_exchange(config, make_mesh(2, W))


def test_a_ragged_exchange_is_one_operation_of_xla_for_tokens_there_and_back():
    shapes = jax.eval_shape(lambda: tuple(map(jnp.asarray, inputs(("balanced", "balanced"), 3, np.float32))))
    lowered = program(Exchange(EXPERT, W, level=0, kind="ragged")).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@ragged_all_to_all") == 4, "tokens, results and their gradients"


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_given_size_that_is_enough_changes_nothing(groups):
    """As in a pipeline: bit for bit what buffers for any load give; and what is too small says so."""
    with jax.enable_x64(True):
        arrays = inputs(("balanced", "balanced"), 1)
        found, known = (run(Exchange(EXPERT, W, groups, level), arrays) for level in (0, LAST))
        assert not found[1][1].too_small.any() and not known[1][1].too_small.any()
        jax.tree.map(np.testing.assert_array_equal, (found[0], found[1][0]), (known[0], known[1][0]))
        full = run(Exchange(EXPERT, W, groups, 0), inputs(("balanced", "all to one device"), 1))[1][1].too_small
        np.testing.assert_array_equal(full > 0, [[False] * LAST] * W + [[True] * LAST] * W)


def test_two_hops_send_fewer_bytes_to_other_groups():
    """Counted in the program of a forward and backward pass: one row for a group instead of one for each device."""
    direct, grouped = (between_groups(Exchange(EXPERT, W, groups, 0)) for groups in (1, 2))
    plans = [Exchange(EXPERT, W, groups, 0).plan(M, 3, E // W).sizes[0].buffers for groups in (1, 2)]
    assert plans == [(15,), (M, 30)]
    assert grouped / direct == pytest.approx(M / (2 * 15))


def between_groups(exchange: Exchange) -> float:
    """Bytes that the program of a forward and backward pass sends from one half of the devices to the other."""
    shapes = jax.eval_shape(lambda: tuple(map(jnp.asarray, inputs(("balanced", "balanced"), 3, np.float32))))
    text = jax.make_jaxpr(program(exchange))(*shapes)
    check_collectives(text)
    return sum(map(crossing_bytes, all_to_alls(text.jaxpr)))


def all_to_alls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "all_to_all":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_to_alls(inner)


def crossing_bytes(equation) -> float:
    groups = equation.params["axis_index_groups"] or [list(range(W))]
    peers = next(group for group in groups if 0 in group)
    far = sum(peer >= W // 2 for peer in peers)
    operand = equation.invars[0].aval
    return operand.size * operand.dtype.itemsize * far / len(peers)


@pytest.mark.slow
def test_fp8_on_the_wire_is_rounded_once():
    """Quantising again in the second hop what the first has quantised changes nothing: as on one device."""
    arrays = inputs(("random", "a little full"), 3, np.float32)
    check_same(run(Exchange(EXPERT, W, 2, LAST), arrays, Codes()), run(None, arrays, Codes()), 1e-5)


def test_the_routings_above_need_every_buffer_size():
    """With one expert per token and 16 tokens per device, balance needs 4 rows; the sizes are 5, 8 and 16."""
    fullest = {}
    for kind in KINDS:
        device = (routing(kind, 1)[:, 0] // (E // W)).reshape(W, M)
        fullest[kind] = max(np.bincount(row, minlength=W).max() for row in device)
    sizes = Exchange(EXPERT, W).plan(M, 1, E // W).sizes
    assert [size.buffers for size in sizes] == [(5,), (8,), (M,)]
    assert fullest["balanced"] <= 5 < fullest["a little full"] <= 8 < fullest["all to one device"] == 16


def test_sizes_of_v3_on_eight_nodes():
    """4,096 tokens of a device, 8 experts each, on 4 of 8 nodes of 8 devices; 4 experts a device."""
    plan = Exchange(EXPERT, 64, 8).plan(4096, 8, 4, limit=(4, 8))
    balanced, _, any_load = plan.sizes
    assert balanced.buffers == (1.25 * 4096 * 4 / 8, 1.25 * 4096 * 8 / 8)
    assert any_load.buffers == (4096, 8 * 4096)
    assert balanced.computed == 1.25 * 4096 * 8 and any_load.computed == 64 * 4096 * 4


def test_sizes_that_are_all_alike_are_given():
    """8 of 16 experts over 2 devices: every token goes to both of them, so there is nothing to choose."""
    plan = Exchange("expert", 2).plan(64, 8, 8)
    assert plan.given == plan.sizes[-1] and plan.given.buffers == (64,)
    assert Exchange("expert", 2).plan(64, 8, 8, limit=(4, 8)).given, "two devices with four of the router's groups each"
    assert Exchange("expert", W).plan(64, 2, E // W).given is None


def test_what_is_reported_as_sent():
    """float64 rows of D numbers there and back, and three indices and factors there; nothing for the device itself.

    In two hops a token goes once to the other group, whichever of its experts are there.
    """
    with jax.enable_x64(True):
        x_MD, weights_MK, *_, experts_MK = inputs(("balanced", "balanced"), 3)
        for groups, (within, across) in ((1, (3 * 15, 0)), (2, (30, M))):
            plan = Exchange(EXPERT, W, groups, 0).plan(M, 3, E // W)
            report = per_device(functools.partial(sent_of, plan), make_mesh(2, W), (BATCH,) * 3, P(SEQUENCES))
            sent = jax.jit(report)(x_MD, experts_MK, weights_MK)
            row = 8 * (D + D) + 3 * (4 + 8)
            np.testing.assert_array_equal(sent.within, within * row)
            np.testing.assert_array_equal(sent.across, across * row)


def sent_of(plan: alltoall.Plan, *of_tokens: jax.Array) -> alltoall.Sent:
    """What a device reports, [1] or [1, sizes]."""
    return jax.tree.map(lambda a: a[None], plan.report(*of_tokens, AS_IS))


def test_groups_that_do_not_divide_the_devices_are_refused():
    for mesh, groups in ((make_mesh(2, W), 3), (make_mesh(8, 1), 2)):
        with pytest.raises(UserError, match=rf"config\.exchange\.groups={groups}: .* split over {mesh.shape[EXPERT]}"):
            make_exchange({"experts": EXPERT}, mesh, groups)
    assert make_exchange({"experts": EXPERT}, make_mesh(8, 1), 1) is None


def test_buffers_by_hand():
    goes_MW = np.array([[True, False], [True, True], [False, True]])
    buffers = jax.jit(fill_buffers, static_argnums=1)(goes_MW, 3)
    np.testing.assert_array_equal(buffers.token_A, [0, 1, 3, 1, 2, 3])  # 3: empty
    np.testing.assert_array_equal(buffers.row_MW, [[0, 6], [1, 3], [6, 4]])  # 6: does not go there


def test_a_full_buffer_keeps_what_it_holds():
    buffers = jax.jit(fill_buffers, static_argnums=1)(np.array([[True, True], [True, False]]), 1)
    np.testing.assert_array_equal(buffers.token_A, [0, 0])
    np.testing.assert_array_equal(buffers.row_MW, [[0, 1], [2, 2]])
