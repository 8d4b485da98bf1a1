"""A whole V4 trains alike on every mesh: experts divided, pipelines, divided sequences; by AdamW and by Muon.

Packed documents, a layer routed by a table, two turns of a group of two layers (CSA, HCA), and multi-token prediction
over streams; without repetition where a mesh takes longer to compile.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run_config
from deepseek_jax.models import v4
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.train.optimizers import adamw, muon
from deepseek_jax.train.pipelined import Pipeline
from deepseek_jax.train.step import Trainer
from tests.train.test_step import ADAMW, EXPERTS, OBJECTIVE, STEP, V, batch, leaves

pytestmark = [pytest.mark.slow, pytest.mark.matrix]  # each mesh compiles a whole step
STEPS = 2
SMALL = {"vocab_size": V, "d_model": 16, "window": 5, "head_width": 8}
SMALL |= {"n_heads": 2, "rope_width": 4, "q_rank": 8, "out_rank": 4, "index_heads": 2, "index_width": 4}
SMALL |= {"index_top_k": 2, "n_experts": 8, "expert_width": 8, "top_k": 2, "sinkhorn_steps": 5}
AUXILIARY = {"expert_balance": 1e-2, "index_kl": 1.0, "index_recall": 0.0}
# The weights by which the first branch reads its streams have gradients of zero but for rounding: all streams are alike
# there, and what the branch reads of them is normed. Adam must not make that larger.
SAFE = ADAMW | {"eps": 1e-5}
METHODS = {"adamw": adamw(**SAFE), "muon": muon(**SAFE, momentum=0.95, rms=0.18)}


class Made:
    """A model with its weights and a table of experts; trained by one device, by each method once."""

    def __init__(self, filled, ratios: tuple[int, ...]):
        m = run_config.load("tiny_v4").model
        m.update(SMALL | {"n_layers": len(ratios) - 1, "compress_ratios": ratios})
        self.sizes = v4.Config.from_config(m)
        made = filled(lambda: v4.Model(self.sizes, rngs=nnx.Rngs(0)), std=0.2)[1:]
        self.params, self.biases = jax.tree.map(np.asarray, made)
        self.table = np.random.default_rng(2).random((1, V, m.n_experts)).argsort(-1)[..., : m.top_k].astype(np.int32)
        self.biases["blocks_0"]["experts"]["router"]["experts_VK"] = self.table
        self.one_device = functools.cache(functools.partial(run, self))


@pytest.fixture(scope="module")
def models(filled):
    return functools.cache(functools.partial(Made, filled))


def run(made: Made, method: str, pipe: int = 1, data: int = 1, expert: int = 1, context: int = 1, **options):
    """(reports, the first moment after the first step, the state as stored after the last one)."""
    schedule, n_micro = options.pop("schedule", "1f1b"), options.pop("n_micro", 1)
    mesh = make_mesh(data, expert, jax.devices()[: pipe * data * context * expert], pipe, context=context)
    trainer = Trainer(
        lambda run, rngs: v4.Model(made.sizes, run, rngs=rngs),
        mesh,
        EXPERTS | options.pop("rules", {}),
        dataclasses.replace(OBJECTIVE, auxiliary=AUXILIARY),
        METHODS[method],
        dataclasses.replace(STEP, micro_batches=n_micro),
        pipeline=Pipeline(schedule),
        **options,
    )
    state, reports, moment = trainer.init(0, made.params, made.biases), [], {}
    for step in range(STEPS):
        state, report = trainer.step(state, global_batch(batch(step), mesh))
        reports.append(jax.device_get(report))
        moment = moment or jax.device_get(trainer.store(state)["optimizer"]["mu"])
    return reports, moment, jax.device_get(trainer.store(state))


RATIOS = (0, 4, 8, 4, 8, 0)
FOUR, SHORT = (0, 4, 8, 8, 0), (0, 4, 8, 0)  # of four stages, DualPipeV's on two ranks; of what takes long to compile
CASES = {
    "a pipeline x experts, Muon": ("muon", {"pipe": 2, "expert": 2, "n_micro": 4}),
    "a pipeline": ("adamw", {"pipe": 2, "n_micro": 4}),
    "data x experts": ("adamw", {"data": 2, "expert": 2}),
    "experts, Muon": ("muon", {"expert": 2}),
    "weights in shards, two parts": ("adamw", {"data": 2, "expert": 2, "rules": {"embed": "data"}, "n_micro": 2}),
    "weights in shards, Muon": ("muon", {"data": 2, "rules": {"embed": "data"}, "remat": "block"}),
    "DualPipeV": ("adamw", {"pipe": 2, "schedule": "dualpipev", "n_micro": 4}),
    "DualPipeV x data, Muon": ("muon", {"pipe": 2, "data": 2, "schedule": "dualpipev", "n_micro": 4}),
    "divided sequences": ("adamw", {"context": 2}),
    "divided sequences x experts, Muon": ("muon", {"context": 2, "expert": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_all_meshes_train_the_same_model(models, case):
    method, options = CASES[case]
    made = models(FOUR if "schedule" in options else SHORT if "context" in options else RATIOS)
    known, found = made.one_device(method), run(made, method, **options)
    for a, b in zip(found[0], known[0], strict=True):
        for field in ("loss", "main", "mtp", "gradient_norm", "max_violation"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=2e-5), field
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), a.auxiliary, b.auxiliary)
        jax.tree.map(np.testing.assert_array_equal, a.loads, b.loads)
    for (path, b), (_, a) in zip(leaves(known[1]), leaves(found[1]), strict=True):  # clipped gradients
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max() + 1e-8, path
    for (path, b), (_, a) in zip(leaves(known[2]), leaves(found[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=path)
    table = found[2]["router_bias"]["blocks_0"]["experts"]["router"]["experts_VK"]
    np.testing.assert_array_equal(table, made.table)
