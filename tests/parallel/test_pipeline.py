"""Pipelines of toy stages on emulated devices: every schedule gives the gradients of the same network without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.pipeline import run_pipeline
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
    """The first stage embeds, the last one has the loss; all report their loss."""

    def stage(weights, x, fixed_and_rest):
        _, rest = fixed_and_rest
        if number == 0:
            x = weights["table"][rest["ids"]]
        x = layer(weights, x)
        loss, y = jnp.mean(x**2) * 0.01, x
        if number == n_stages - 1:
            loss, y = loss + jnp.mean((x @ weights["head"] - rest["target"]) ** 2), jnp.zeros_like(x)
        return y, loss, {"loss": loss}

    return stage


def make_weights(n_stages):
    rng = np.random.default_rng(0)

    def w(*shape):
        return jnp.asarray(rng.normal(size=(n_stages, *shape)) / np.sqrt(D), jnp.float32)

    return {"in": w(D, D), "expert": w(D, D), "out": w(D, D), "table": w(9, D), "head": w(D, 1)}


def make_rest():
    rng = np.random.default_rng(1)
    return {
        "ids": jnp.asarray(rng.integers(0, 9, (MICRO, E, T)), jnp.int32),
        "target": jnp.asarray(rng.normal(size=(MICRO, E, T, 1)), jnp.float32),
    }


def reference(n_stages):
    """Gradients of each stage's weights and the loss, one micro-batch after the other, without a pipeline."""
    mesh = jax.make_mesh((E,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:E])
    weights, rest = make_weights(n_stages), make_rest()

    def loss(weights, rest):
        total = 0.0
        for m in range(MICRO):
            x = jnp.zeros((T, D))
            for number in range(n_stages):
                own = jax.tree.map(lambda a, number=number: a[number], weights)
                x, part, _ = stage_of(number, n_stages)(own, x, ({}, jax.tree.map(lambda a, m=m: a[m, 0], rest)))
                total += part
        return total

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
IDS = [f"{name}, {kept.__name__} saved, {'one switch' if overlap else 'three'}" for name, kept, overlap in CASES]


@pytest.mark.parametrize(("name", "saveable", "overlap"), CASES, ids=IDS)
def test_gradients_are_those_without_a_pipeline(name, saveable, overlap, references):
    schedule = SCHEDULES[name](RANKS, MICRO)
    lanes = schedule.lanes
    n_stages = len(lanes[0])
    number = {place: i for lane in lanes for i, place in enumerate(lane)}
    chunks = range(max(chunk for _, chunk in number) + 1)
    kinds = (0, 1, n_stages - 1)  # the first stage, an inner one, the last
    table = make_table(schedule, lambda place: min(number[place], 1) + (number[place] == n_stages - 1))
    mesh = jax.make_mesh((RANKS, E), ("pipe", "expert"), axis_types=(AxisType.Auto,) * 2)
    weights = make_weights(n_stages)
    of_rank = jnp.asarray([[number[rank, c] for c in chunks] for rank in range(RANKS)])
    placed = jax.tree.map(lambda a: a[of_rank], weights)  # ranks, chunks

    def on_device(placed, rest):
        mine = [jax.tree.map(lambda a, c=c: a[0, c], placed) for c in chunks]
        rest = jax.tree.map(lambda a: a[:, 0], rest)
        x = jax.ShapeDtypeStruct((T, D), jnp.float32)
        one = jax.tree.map(lambda a: a[0], rest)
        stages = [split(stage_of(kind, n_stages), mine[0], x, ({}, one), saveable) for kind in kinds]
        gradients, reports = run_pipeline(table, stages, mine, [{}] * len(mine), rest, x, overlap)
        loss = lax.psum(sum(report["loss"] for report in reports), "pipe")
        return jax.tree.map(lambda *a: jnp.stack(a)[None, None], *gradients), loss[None]

    run = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P("pipe"), P(None, "expert")),
            out_specs=(P("expert", "pipe"), P("expert")),
            check_vma=False,
        )
    )
    check_collectives(jax.make_jaxpr(run)(placed, make_rest()))
    found, loss = jax.device_get(run(placed, make_rest()))
    known_loss, known = references[n_stages]
    assert np.allclose(loss, known_loss, rtol=1e-5)
    for key, gradient in found.items():
        summed = np.zeros_like(known[key])
        for rank in range(RANKS):
            for chunk in chunks:
                summed[:, number[rank, chunk]] += gradient[:, rank, chunk]  # DualPipe: two copies of a stage
        assert np.abs(summed - known[key]).max() <= 2e-6 * np.abs(known[key]).max() + 1e-7, key
