"""A stack that repeats a group of different blocks, in plans and in published names.

The family is defined here, outside the package: a dense block, then one with experts, over and over. Its twin has the
same layers in two stacks, the dense ones first: whatever does not depend on the order of the layers is the same.
"""

import functools
import json
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.chips import CHIPS
from deepseek_jax.convert import names
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, logical_axes, split
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.decoder import Decoder, Stack
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.router import sequence_balance, sigmoid_biased_topk
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.plan import flops
from deepseek_jax.plan.activations import kept, v3_bytes
from deepseek_jax.plan.counts import count
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.layout import make_layout, make_stages
from deepseek_jax.plan.memory import rank_memory
from deepseek_jax.plan.network import abstract_model, cache_bytes_per_token, describe
from deepseek_jax.plan.recipes import recipe
from deepseek_jax.plan.schedules import SCHEDULES
from deepseek_jax.plan.step_time import recomputed_flops, step
from deepseek_jax.plan.traffic import rank_traffic
from deepseek_jax.serve import loads
from deepseek_jax.tree import paths

REPEATS, RULES = 3, {"experts": "expert"}
EXPERTS = ExpertsConfig(n_experts=4, n_shared_experts=1, expert_width=8, top_k=2)


@dataclass(frozen=True)
class Sizes:
    """Of both families."""

    experts: ExpertsConfig = EXPERTS
    d_model: int = 8
    vocab_size: int = 16


class Model(Decoder):
    """Two kinds of blocks, alternating or each in its own stack."""

    def __init__(self, sizes, run, *, rngs, is_grouped):
        route = functools.partial(sigmoid_biased_topk, top_k=2, n_groups=1, top_groups=1, scale=1.0)

        def attention(rngs):
            return GQA(GQAConfig(2, 1, 4), 8, run, rngs=rngs)

        def dense(rngs):
            return Block(attention, lambda r: SwiGLU(8, 24, 0.1, rngs=r), "mlp", 8, 1e-6, rngs=rngs)

        def moe(rngs):
            def experts(rngs):
                return Experts(sizes.experts, 8, route, sequence_balance, run, rngs=rngs)

            return Block(attention, experts, "experts", 8, 1e-6, rngs=rngs)

        grouped = (Stack("blocks", (dense, moe), REPEATS),)
        apart = (Stack("dense_blocks", (dense,), REPEATS), Stack("moe_blocks", (moe,), REPEATS))
        super().__init__(16, 8, 1e-6, 0.1, run, grouped if is_grouped else apart, rngs=rngs)


def family(*, is_grouped: bool) -> ModuleType:
    found = ModuleType(f"toy, grouped: {is_grouped}")
    found.Model = functools.partial(Model, is_grouped=is_grouped)
    found.flops_per_pair = lambda sizes: 4 * 2 * 4
    return found


PAIR = (family(is_grouped=True), family(is_grouped=False))


@pytest.fixture(scope="module")
def networks():
    """The group's, and its twin's."""
    return tuple(describe(it, Sizes()) for it in PAIR)


def test_the_loads_of_served_experts_are_told_by_layer_and_read_by_block(tmp_path):
    """Layer 2 r + 1 of the stack is the block with experts of its repeat r."""
    model, draw = abstract_model(PAIR[0], Sizes(), SINGLE_DEVICE), np.random.default_rng(0)
    definition, *weights = split(model)
    weights = jax.tree.map(lambda shape: jnp.asarray(draw.normal(size=shape.shape), shape.dtype), weights)
    programs = SimpleNamespace(definition=definition, matmul_precision="default")
    busy = loads.ExpertLoads(SimpleNamespace(weights=tuple(weights), programs=programs))
    for _ in range(2):
        busy.note([1, 2, 3, 4, 5])
        told = busy.measure()
    assert [layer.name for layer in told] == [f"blocks {2 * repeat + 1}" for repeat in range(REPEATS)]
    assert [sum(layer.load) for layer in told] == [2 * 5 * EXPERTS.top_k] * REPEATS
    (tmp_path / "loads.json").write_text(json.dumps({"layers": [layer._asdict() for layer in told]}))
    for tree in (loads.read(tmp_path / "loads.json"), busy.counts):
        ((path, load_LE),) = paths(tree).items()
        assert path == ("blocks", "blocks", "1") and load_LE.tolist() == [layer.load for layer in told]
        experts = {path[:-1] for path, axes in paths(logical_axes(model)[0]).items() if "experts" in axes}
        assert {one[: len(path)] for one in experts} == {path}, "as `on_mesh.Redundant` looks them up"


def job(network, *, style="run", remat="none", **mesh):
    sizes = {"pipe": 1, "data": 1, "expert": 1, "micro_batches": 1} | mesh
    layout = make_layout(**sizes, devices=0, batch=8, seq_len=16)
    found = recipe(style, precision="fp32", moments_dtype="float32", remat=remat)
    return Job(network, layout, CHIPS["h800"], SCHEDULES["1f1b"], found, RULES)


def test_counts_operations_and_cache_are_those_of_the_same_layers(networks):
    assert networks[0].n_layers == networks[1].n_layers == 2 * REPEATS
    assert count(networks[0]) == count(networks[1])
    for causal in (False, True):
        assert flops.forward(networks[0], 16, causal=causal) == flops.forward(networks[1], 16, causal=causal)
    assert len({cache_bytes_per_token(it, Sizes()) for it in PAIR}) == 1


@pytest.mark.parametrize("style", ["run", "v3"])
def test_a_step_takes_and_sends_what_it_does_with_the_same_layers(networks, style):
    one, other = (job(network, style=style, expert=2) for network in networks)
    assert vars(step(one)) == pytest.approx(vars(step(other)))
    assert recomputed_flops(one) == recomputed_flops(other)
    assert rank_traffic(one, 0).total == pytest.approx(rank_traffic(other, 0).total)


def test_a_repeat_of_the_group_keeps_what_both_blocks_keep(networks):
    (group,), both = (
        kept(it, Sizes(), network, job(network).layout, job(network).recipe, RULES).values()
        for it, network in zip(PAIR, networks, strict=True)
    )
    assert group.per_sequence == pytest.approx(sum(block.per_sequence for block in both), rel=0.02)
    assert v3_bytes(networks[0], "blocks") == v3_bytes(networks[1], "dense_blocks") + v3_bytes(
        networks[1], "moe_blocks"
    )


@pytest.mark.slow
def test_a_device_holds_what_it_does_with_the_same_layers(networks):
    parts = []
    for network, it in zip(networks, PAIR, strict=True):
        mine = job(network, remat="block", expert=2)
        found = rank_memory(mine, 0, kept(it, Sizes(), network, mine.layout, mine.recipe, RULES), 16)
        parts.append({name: found[name] for name in ("weights", "gradients", "optimizer", "router_biases")})
        streams = 1 + (REPEATS if it is PAIR[0] else 2 * REPEATS)  # the head's input, and one per repeat
        assert found["activations"] == streams * mine.layout.sequences * 16 * 8 * 4
    assert parts[0] == parts[1]


def test_a_pipeline_divides_between_groups_only(networks):
    stages = make_stages(networks[0], REPEATS, 16)
    assert [(stage.n_layers, stage.n_expert_layers) for stage in stages] == [(2, 1)] * REPEATS
    assert len(make_stages(networks[1], REPEATS + 1, 16)) == REPEATS + 1
    with pytest.raises(UserError, match="4 pipeline stages for 6 layers: expected at most one stage per group of lay"):
        make_stages(networks[0], REPEATS + 1, 16)


@pytest.fixture(scope="module")
def shapes():
    """Weights of the group's model, as shapes."""
    return dict(zip(("params", "router_bias"), split(abstract_model(PAIR[0], Sizes()))[1:], strict=True))


def test_published_layers_are_the_blocks_in_their_order_of_running(shapes):
    found = {tensor.name: tensor.places for tensor in names.tensors(shapes)}
    dense = {int(name.split(".")[2]) for name in found if name.endswith("mlp.gate_proj.weight") and "exp" not in name}
    moe = {int(name.split(".")[2]) for name in found if name.endswith("mlp.gate.weight")}
    assert (dense, moe) == ({0, 2, 4}, {1, 3, 5})
    group = ("blocks", "blocks")
    assert found["model.layers.2.self_attn.k_proj.weight"] == ((("params", *group, "0", "attention", "k_DZQ"), (1,)),)
    assert found["model.layers.3.mlp.experts.2.up_proj.weight"] == (
        (("params", *group, "1", "experts", "up_XDF"), (1, 2)),
    )
    assert found["model.layers.5.mlp.gate.e_score_correction_bias"] == (
        (("router_bias", *group, "1", "experts", "router", "bias_E"), (2,)),
    )


def test_every_number_is_published_once_and_comes_back(shapes):
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=leaf.shape) for path, leaf in paths(shapes).items()}
    again = {path: np.full(leaf.shape, np.nan) for path, leaf in values.items()}
    for tensor in names.tensors(shapes):
        published = tensor.to_theirs([values[path][index] for path, index in tensor.places])
        assert published.shape == tensor.shape
        for (path, index), part in zip(tensor.places, tensor.to_ours(published), strict=True):
            assert np.isnan(again[path][index]).all()
            again[path][index] = part
    for path, array in values.items():
        np.testing.assert_array_equal(again[path], array)
