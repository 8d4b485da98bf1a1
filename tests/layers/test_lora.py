"""Low-rank adapters: B = 0 is the base; added layer by layer is merged; they alone are trained, on any mesh alike."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from deepseek_jax.configs import tiny_v4
from deepseek_jax.convert import peft
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers import lora
from deepseek_jax.layers.base import SINGLE_DEVICE, bind, split
from deepseek_jax.models import family
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.train.loss import PreTraining
from deepseek_jax.train.optimizers import adamw
from deepseek_jax.train.step import StepConfig, Trainer
from deepseek_jax.train.trainable import divide

B, T, RANK, ALPHA = 8, 12, 3, 6.0
ADAPTED = replace(SINGLE_DEVICE, adapt=lora.add)


def maker(name, sizes):
    """(a function that builds a family's model, its adapters)."""
    module = family(name)
    config = module.Config.from_config(sizes)

    def build(run=SINGLE_DEVICE, rngs=None):
        return module.Model(config, run, rngs=rngs or nnx.Rngs(0))

    _, params, router_bias = split(nnx.eval_shape(build))
    return build, peft.lora({"params": params, "router_bias": router_bias}, RANK, ALPHA, "all-linear")


@pytest.fixture(scope="module")
def model(tiny_sizes, filled):
    """V3 with adapters: (build, adapters, definitions without and with them, weights, router biases)."""
    build, adapters = maker("v3", tiny_sizes)
    plain = split(nnx.eval_shape(build))[0]
    made = filled(lambda: lora.attach(build(ADAPTED), adapters, rngs=nnx.Rngs(0)))
    return adapters, plain, *made


def without(params):
    return divide(params, lora.is_adapter)[1]


def zeroed(params):
    """Weights whose adapters have B = 0."""
    flat = flatten_dict(params, keep_empty_nodes=True)
    return unflatten_dict({path: x * 0 if path[-1] == "up" else x for path, x in flat.items()})


@functools.partial(jax.jit, static_argnums=0)
def answered(definition, params, router_bias):
    """Logits of whole sequences, and of the last token over a cache."""
    bound = bind(definition, params, router_bias)
    ids_BT = jnp.arange(2 * T).reshape(2, T) % 60
    _, cache = bound.prefill(ids_BT[:, :-1], T)
    last, _ = bound.decode(ids_BT[:, -1:], jnp.full((2, 1), T - 1), cache)
    return bound(ids_BT), last


@pytest.mark.slow
def test_adapters_that_have_learnt_nothing_change_no_bit(model):
    _, plain, adapted, params, router_bias = model
    ours = answered(adapted, zeroed(params), router_bias)
    jax.tree.map(np.testing.assert_array_equal, ours, answered(plain, without(params), router_bias))


@pytest.mark.slow
def test_merged_is_adapted(model):
    adapters, plain, adapted, params, router_bias = model
    ours = answered(adapted, params, router_bias)
    merged = answered(plain, lora.merged(params, adapters), router_bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()), ours, merged)
    base = answered(plain, without(params), router_bias)
    assert np.abs(ours[0] - base[0]).max() > 0.1 * np.abs(base[0]).max()
    np.testing.assert_allclose(ours[0][:, -1], ours[1].reshape(2, -1), atol=1e-4 * np.abs(base[0]).max())


def small_v4():
    """Two layers, one repeat after the other."""
    sizes = tiny_v4.get_config().model
    sizes.update(vocab_size=64, d_model=16, n_layers=4, compress_ratios=(0, 4) * 2, n_hash_layers=0, mtp_depth=0)
    sizes.update(n_heads=2, head_width=8, rope_width=4, q_rank=8, out_rank=4, window=4, n_experts=4, expert_width=8)
    sizes.update(index_heads=2, index_width=4, index_top_k=2, top_k=2, sinkhorn_steps=2, n_streams=2)
    return sizes


@pytest.mark.slow
def test_merged_is_adapted_where_a_stack_repeats_a_group_of_layers(filled):
    """V4, whose layers each have adapters of their own; those that have learnt nothing change no bit."""
    build, adapters = maker("v4", small_v4())
    plain = split(nnx.eval_shape(build))[0]
    adapted, params, biases = filled(lambda: lora.attach(build(ADAPTED), adapters, rngs=nnx.Rngs(0)), std=0.3)
    said = jax.jit(lambda definition, params: bind(definition, params, biases)(jnp.arange(12)[None]), static_argnums=0)
    ours, merged = said(adapted, params), said(plain, lora.merged(params, adapters))
    np.testing.assert_allclose(ours, merged, atol=1e-5 * np.abs(merged).max())
    base = said(plain, without(params))
    assert np.abs(ours - base).max() > 0.1 * np.abs(merged).max()
    np.testing.assert_array_equal(said(adapted, zeroed(params)), base)


def test_a_matrix_by_hand(model):
    """kv_b_proj, [(H (N + U)), C], holds k_up_CHN and v_up_CHU, which share A."""
    adapters, _, _, params, _ = model
    block = params["moe_blocks"]
    adapter = block["adapters"]["self_attn_kv_b_proj"]
    delta_EC = ALPHA / RANK * np.asarray(adapter["up"][1]).T @ np.asarray(adapter["down"][1]).T
    delta_HYC = delta_EC.reshape(2, 16, 16)
    got = lora.merged(params, adapters)["moe_blocks"]["attention"]
    for name, part_HYC in (("k_up_CHN", delta_HYC[:, :8]), ("v_up_CHU", delta_HYC[:, 8:])):
        expected = block["attention"][name][1] + part_HYC.transpose(2, 0, 1)
        np.testing.assert_allclose(got[name][1], expected, rtol=1e-5, atol=1e-6)


def test_what_takes_adapters(model):
    """Attention of every layer; no feed-forward beside routed experts, no router, embedding, head or MTP."""
    adapters, _, _, params, _ = model
    attention = {f"self_attn_{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    named = {block: {target.name for target in targets} for block, targets in adapters.blocks}
    assert named == {("dense_blocks",): attention, ("moe_blocks",): attention}
    found = {path for path in flatten_dict(params) if lora.is_adapter(path)}
    assert found == {*lora.abstract_adapters(without(params), adapters)}


STEP = StepConfig(lambda step: 0.01, clip_norm=1.0, micro_batches=1, balance_rate=0.0, balance_rate_stop=0)
ADAM = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, moments_dtype="float32")
OBJECTIVE = dict(chunk=64, mask_documents=True, mtp_weight=0.0, mtp_weight_final=0.0, mtp_weight_switch=0)


def small_v1():
    from deepseek_jax.configs import tiny_v1

    sizes = tiny_v1.get_config().model
    sizes.update(vocab_size=64, d_model=32, n_layers=2, dense_width=48, n_heads=4, n_kv_heads=2, head_width=8)
    return sizes


def trained(n_data, rules, step, model=("v1", small_v1), n_expert=1):
    """(the trainer, its weights before and after two steps, its last state) of a model on a mesh."""
    build, adapters = maker(model[0], model[1]())
    mesh = make_mesh(n_data, n_expert, jax.devices()[: n_data * n_expert])
    silent = {"expert_balance": 0.0, "index_kl": 0.0, "index_recall": 0.0} if model[0] == "v4" else {}
    trainer = Trainer(
        lambda run, rngs: lora.attach(build(replace(run, adapt=lora.add), rngs), adapters, rngs=rngs),
        *(mesh, rules, PreTraining(**OBJECTIVE, auxiliary=silent), adamw(**ADAM), step),
        trainable=lora.is_adapter,
    )
    state = trainer.init(0)
    before = jax.device_get(state["params"])
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (B, T + 1), np.int32)
    batch = Batch.of_windows(ids)._replace(weights_BT=rng.choice([0.0, 1.0], (B, T)).astype(np.float32))
    for _ in range(2):
        state, _ = trainer.step(state, global_batch(batch, mesh))
    return trainer, before, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return trained(1, {}, STEP)


def check_trained_alone(before, state):
    for path, array in flatten_dict(state["params"]).items():
        moved = not np.array_equal(array, flatten_dict(before)[path])
        assert moved == lora.is_adapter(path), path
    moments = flatten_dict(state["optimizer"]["mu"])
    assert {*moments} == {path for path in flatten_dict(before) if lora.is_adapter(path)}


@pytest.mark.slow
def test_adapters_alone_are_trained_and_have_moments(one_device):
    trainer, before, state = one_device
    check_trained_alone(before, state)
    first = trainer.first_weights(0, lora.is_adapter)
    jax.tree.map(np.testing.assert_array_equal, first, divide(before, lora.is_adapter)[0])


@pytest.mark.slow
def test_every_mesh_trains_the_same_adapters(one_device):
    """FSDP over four devices, in two micro-batches."""
    _, before, ours = one_device
    _, same, theirs = trained(4, {"embed": "data"}, replace(STEP, micro_batches=2))
    jax.tree.map(np.testing.assert_array_equal, before, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours["params"], theirs["params"])


@pytest.mark.slow
@pytest.mark.matrix  # compiles two whole steps
@pytest.mark.usefixtures("any_load")
def test_adapters_of_v4_are_trained_alone_and_alike_where_experts_are_divided():
    (_, before, ours), (_, same, theirs) = (
        trained(1, rules, STEP, ("v4", small_v4), n) for rules, n in (({}, 1), ({"experts": "expert"}, 2))
    )
    check_trained_alone(before, ours)
    jax.tree.map(np.testing.assert_array_equal, before, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours["params"], theirs["params"])
