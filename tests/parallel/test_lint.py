"""Collectives in branches and loops that devices enter differently: planted ones are found, ours pass."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deepseek_jax import run, run_config
from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.mesh import make_mesh
from pallas_kernels import mosaic_gpu

NANO = str(Path(__file__).parents[1] / "train" / "nano_v3.py")
FP8_KERNELS = ("quantize", "quantize_swiglu", "quantize_squares", "fp8_matmul", "grouped_fp8_matmul")
FP8_KERNELS += ("grouped_fp8_weight_gradient",)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("pipe", "expert"), axis_types=(AxisType.Auto,) * 2)


def traced(body, mesh):
    run = jax.shard_map(body, mesh=mesh, in_specs=(P("expert"),), out_specs=P("expert"), check_vma=False)
    return jax.make_jaxpr(jax.jit(run))(jnp.ones((8, 8)))


def send(x):
    return lax.ppermute(x, "pipe", [(0, 1)])


def exchange(x):
    return lax.all_to_all(x, "expert", 0, 0, tiled=True)


def same(x):
    return x


def along(axis):
    return lax.axis_index(axis) % 2


HANGS = {
    "a sum in one branch": (
        lambda x: lax.cond(along("pipe") == 0, lambda x: lax.psum(x, "pipe"), same, x),
        "psum over 'pipe' in branch 1 of 2 of a switch, which differs along 'pipe'",
    ),
    "the same transfer in both branches": (
        lambda x: lax.switch(along("pipe"), [send, send], x),
        "ppermute over 'pipe' in branch 0 of 2",
    ),
    "an exchange among devices that went apart": (
        lambda x: lax.switch(along("expert"), [same, exchange], x),
        "all_to_all over 'expert' in branch 1 of 2",
    ),
    "a predicate from data that differs": (
        lambda x: lax.cond(x.sum() > 0, exchange, same, x),
        "all_to_all over 'expert' in branch 1 of 2",
    ),
    "a predicate that went through a loop": (
        lambda x: lax.cond(lax.fori_loop(0, 3, lambda _, s: s + along("expert"), 0) > 2, exchange, same, x),
        "all_to_all over 'expert'",
    ),
    "a loop of different lengths": (
        lambda x: lax.fori_loop(0, along("pipe"), lambda _, x: lax.psum(x, "pipe"), x),
        "psum over 'pipe' in a while loop, whose number of turns, which differs along 'pipe'",
    ),
    "a branch inside a scan, a jit and a checkpoint": (
        lambda x: lax.scan(
            jax.jit(jax.checkpoint(lambda x, _: (lax.switch(along("pipe"), [same, send], x), None))), x, None, length=2
        )[0],
        "ppermute over 'pipe'",
    ),
    "an inner branch that agrees in an outer one that does not": (
        lambda x: lax.cond(
            along("pipe") == 0, lambda x: lax.cond(jnp.bool_(True), lambda x: lax.pmax(x, "pipe"), same, x), same, x
        ),
        "pmax over 'pipe' in branch 1 of 2",
    ),
}


@pytest.mark.parametrize("case", HANGS)
def test_planted_hangs_are_found(case, mesh):
    body, words = HANGS[case]
    with pytest.raises(ValueError, match=words):
        check_collectives(traced(body, mesh))


FINE = {
    "an exchange in branches that differ along another axis": lambda x: lax.switch(along("pipe"), [same, exchange], x),
    "a predicate that all devices agree on": lambda x: lax.cond(lax.pmax(x.sum(), "expert") > 0, exchange, same, x),
    "a transfer after the branches": lambda x: send(lax.switch(along("pipe"), [same, lambda x: 2 * x], x)),
    "a loop of a fixed length": lambda x: lax.fori_loop(0, 3, lambda _, x: send(x), x),
    "a predicate gathered from all": lambda x: lax.cond(lax.all_gather(x, "expert").sum() > 0, exchange, same, x),
}


@pytest.mark.parametrize("case", FINE)
def test_sound_programs_pass(case, mesh):
    check_collectives(traced(FINE[case], mesh))


@pytest.mark.slow
@pytest.mark.matrix
def test_the_step_in_fp8_with_kernels_of_a_gpu_passes(monkeypatch):
    """DualPipe with exchanges and every kernel of Hopper; kernels are traced like any program, and looked into."""
    monkeypatch.setattr(mosaic_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(mosaic_gpu, "check_hopper", lambda name: 132)
    widths = {"d_model": 256, "dense_width": 512, "q_rank": 256, "kv_rank": 256, "nope_width": 128, "rope_width": 64}
    sizes = widths | {"value_width": 128, "expert_width": 256, "n_layers": 3}
    keys = {f"model.{name}": size for name, size in sizes.items()} | {"precision": "fp8", "data.seq_len": 256}
    keys |= {"mesh.pipe": 2, "mesh.data": 1, "mesh.expert": 2, "pipeline.micro_batches": 4, "batch.size_start": 8}
    keys |= {"pipeline.schedule": "dualpipe", "kernels.attention": "mosaic_gpu", "kernels.grouped_matmul": "mosaic_gpu"}
    keys |= {f"kernels.{name}": "mosaic_gpu" for name in FP8_KERNELS}
    config = run_config.override(run_config.load(NANO), {key: str(value) for key, value in keys.items()})
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:4])
    trainer = run.trainer(config, mesh)
    check_collectives(trainer.step.trace(trainer.abstract, run.abstract_batch(config, mesh)).jaxpr)
