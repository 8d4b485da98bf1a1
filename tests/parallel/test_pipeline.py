"""Pipelines of toy stages on emulated devices: every schedule gives the gradients of the same network without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.homes import make_homes
from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.pipeline import Ends, run_pipeline
from deepseek_jax.parallel.schedule import SCHEDULES
from deepseek_jax.parallel.split_backward import everything, nothing, split
from deepseek_jax.parallel.tick_table import make_table

D, T, E = 4, 6, 2  # width, tokens of a micro-batch, devices that share the experts
RANKS, MICRO = 4, 8


def layer(weights, x):
    """Residual matmuls, the second after an exchange of tokens with the other devices of the experts."""
    hidden = jax.nn.silu(x @ weights["in"])
    there = lax.all_to_all(hidden, "expert", 0, 0, tiled=True)
    back = lax.all_to_all(there @ weights["expert"], "expert", 0, 0, tiled=True)
    return x + back @ weights["out"]


def stage_of(number, n_stages):
    """The last stage is given something besides x and puts out what the head reads; all have a loss."""

    def stage(weights, x_and_given, fixed_and_rest):
        x, given = x_and_given
        y = layer(weights, x + given if number == n_stages - 1 else x)
        loss, none = jnp.mean(y**2) * 0.01, jnp.zeros_like(y)
        return (none, y) if number == n_stages - 1 else (y, none), loss, {"loss": loss}

    return stage


def head_loss(out, head, rest):
    return jnp.mean((out @ head - rest["target"]) ** 2)


def ends_of(table, head):
    """Embedding and head on all ranks; only the first has rows, and a gradient of the head."""

    def on_first(tree):
        return jax.tree.map(lambda a: jnp.where(lax.axis_index("pipe") == 0, a, 0), tree)

    def loss(out, rest):
        value, (d_out, d_head) = jax.value_and_grad(head_loss, (0, 1))(out, head, rest)
        return value, d_out, on_first({"head": d_head})

    def given(first, last):
        return lax.psum(on_first((table[first["ids"]], table[last["ids"]])), "pipe")

    def backward(first, last, d):
        return on_first({"table": jnp.zeros_like(table).at[first["ids"]].add(d[0]).at[last["ids"]].add(d[1])})

    return Ends(given, loss, backward)


def make_weights(n_stages):
    rng = np.random.default_rng(0)

    def w(*shape):
        return np.float32(rng.normal(size=(n_stages, *shape)) / np.sqrt(D))

    return {"in": w(D, D), "expert": w(D, D), "out": w(D, D)}, {"table": w(9, D)[0], "head": w(D, 1)[0]}


def make_rest():
    rng = np.random.default_rng(1)
    return {
        "ids": rng.integers(0, 9, (MICRO, E, T)).astype(np.int32),
        "target": rng.normal(size=(MICRO, E, T, 1)).astype(np.float32),
    }


def reference(n_stages):
    """Gradients of each stage's weights and the loss, one micro-batch after the other, without a pipeline."""
    mesh = jax.make_mesh((E,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:E])
    weights, rest = make_weights(n_stages), make_rest()

    def loss(weights, rest):
        def add(total, of_batch):
            x = given = weights[1]["table"][of_batch["ids"]]
            for number in range(n_stages):
                own = jax.tree.map(lambda a, number=number: a[number], weights[0])
                (x, out), part, _ = stage_of(number, n_stages)(own, (x, given), ({}, of_batch))
                total += part
            return total + head_loss(out, weights[1]["head"], of_batch), None

        return lax.scan(add, jnp.float32(0), jax.tree.map(lambda a: a[:, 0], rest))[0]

    run = jax.shard_map(
        lambda w, r: tuple(jax.tree.map(lambda a: a[None], t) for t in jax.value_and_grad(loss)(w, r)),
        mesh=mesh,
        in_specs=(P(), P(None, "expert")),
        out_specs=P("expert"),
        check_vma=False,
    )
    return jax.device_get(jax.jit(run)(weights, rest))


@pytest.fixture(scope="module")
def references():
    return {n: reference(n) for n in (RANKS, 2 * RANKS)}


CASES = [(name, everything, True) for name in SCHEDULES]
CASES += [("zb1p", nothing, True), ("dualpipe", nothing, False), ("dualpipev", everything, False)]


def case(name: str, kept, overlap: bool):
    """Fast are the simplest schedule and the one that has most."""
    said = f"{name}, {kept.__name__} saved, {'one switch' if overlap else 'three'}"
    is_slow = (name, overlap) not in (("1f1b", True), ("dualpipe", True))
    return pytest.param(name, kept, overlap, id=said, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("name", "saveable", "overlap"), [case(*each) for each in CASES])
def test_gradients_are_those_without_a_pipeline(name, saveable, overlap, references):
    schedule = SCHEDULES[name](RANKS, MICRO)
    lanes = schedule.lanes
    n_stages = len(lanes[0])
    number = {place: i for lane in lanes for i, place in enumerate(lane)}
    chunks = range(max(chunk for _, chunk in number) + 1)
    kinds = (0, 1, n_stages - 1)  # the first stage, an inner one, the last

    def kind_at(place):
        return min(number[place], 1) + (number[place] == n_stages - 1)

    table = make_table(schedule, kind_at)
    mesh = jax.make_mesh((RANKS, E), ("pipe", "expert"), axis_types=(AxisType.Auto,) * 2)
    weights, at_ends = make_weights(n_stages)
    kind_of = np.array([[kind_at((rank, c)) for c in chunks] for rank in range(RANKS)])
    of_rank = np.array([[number[rank, c] for c in chunks] for rank in range(RANKS)])
    placed = jax.tree.map(lambda a: a[of_rank], weights)  # ranks, chunks

    def on_device(placed, at_ends, rest):
        mine = [jax.tree.map(lambda a, c=c: a[0, c], placed) for c in chunks]
        rest = jax.tree.map(lambda a: a[:, 0], rest)
        x = jax.ShapeDtypeStruct((T, D), jnp.float32)
        one = jax.tree.map(lambda a: a[0], rest)
        stages = [split(stage_of(kind, n_stages), mine[0], (x, x), ({}, one), saveable) for kind in kinds]
        ends = ends_of(**at_ends)
        homes = make_homes(kind_of, jax.eval_shape(lambda: mine[0]), [stage.is_read for stage in stages])
        sums, reports, (of_ends, at_head) = run_pipeline(
            table, stages, homes, homes.filled(mine), lambda _: {}, rest, x, ends, overlap=overlap
        )
        gradients = [homes.of_chunk(sums, chunk) for chunk in chunks]
        loss = lax.psum(sum(report["loss"] for report in reports) + at_head, "pipe")
        stacked = jax.tree.map(lambda *a: jnp.stack(a)[None, None], *gradients)
        return stacked, lax.psum(of_ends, ("pipe", "expert")), loss[None]

    run = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P("pipe"), P(), P(None, "expert")),
            out_specs=(P("expert", "pipe"), P(), P("expert")),
            check_vma=False,
        )
    )
    check_collectives(jax.make_jaxpr(run)(placed, at_ends, make_rest()))
    found, found_ends, loss = jax.device_get(run(placed, at_ends, make_rest()))
    known_loss, (known, known_ends) = references[n_stages]
    for key, gradient in found_ends.items():
        expected = known_ends[key].sum(axis=0)
        assert np.abs(gradient - expected).max() <= 2e-6 * np.abs(expected).max() + 1e-7, key
    assert np.allclose(loss, known_loss, rtol=1e-5)
    for key, gradient in found.items():
        summed = np.zeros_like(known[key])
        for rank in range(RANKS):
            for chunk in chunks:
                summed[:, number[rank, chunk]] += gradient[:, rank, chunk]  # DualPipe: two copies of a stage
        assert np.abs(summed - known[key]).max() <= 2e-6 * np.abs(known[key]).max() + 1e-7, key
