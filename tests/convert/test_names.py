"""The table of names: it covers every model, both directions are inverse, and two cases worked by hand."""

import itertools
import math

import numpy as np
import pytest
from flax import nnx

from deepseek_jax.configs import (
    moe_16b,
    r1_0528_qwen3_8b,
    r1_distill_qwen_7b,
    tiny_moe,
    tiny_v1,
    tiny_v2,
    tiny_v2_lite,
    tiny_v3,
    v2_236b,
    v2_lite,
    v3_671b,
)
from deepseek_jax.convert import names
from deepseek_jax.layers.base import split
from deepseek_jax.models import family
from deepseek_jax.shapes import LEGEND

TINY = {module.__name__.rpartition(".")[2]: module for module in (tiny_moe, tiny_v1, tiny_v2, tiny_v2_lite, tiny_v3)}


def shapes_of(config) -> dict:
    module = family(config.family)
    sizes = module.Config.from_config(config.model)
    _, params, bias = split(nnx.eval_shape(lambda: module.Model(sizes, rngs=nnx.Rngs(0))))
    return {"params": params, "router_bias": bias}


@pytest.fixture(scope="module", params=TINY)
def shapes(request) -> dict:
    return shapes_of(TINY[request.param].get_config())


def test_every_element_of_every_weight_comes_from_one_tensor(shapes):
    flat = names.flatten(shapes)
    count = {path: np.zeros(shape[:2], int) for path, shape in flat.items()}
    total = 0
    for tensor in names.tensors(shapes):
        total += math.prod(tensor.shape)
        for path, index in tensor.places:
            count[path][index] += 1
    assert all((there == 1).all() for there in count.values())
    assert total == sum(map(math.prod, flat.values()))


def test_published_names_are_unique_and_copies_are_not_among_them(shapes):
    found = [tensor.name for tensor in names.tensors(shapes)]
    copies = names.copies(shapes)
    assert len(found) == len(set(found))
    assert not copies.keys() & set(found) and set(copies.values()) <= set(found)


def test_there_and_back_is_the_same_tensor(shapes):
    rng = np.random.default_rng(0)
    flat = names.flatten(shapes)
    for tensor in names.tensors(shapes):
        array = rng.normal(size=tensor.shape).astype(np.float32)
        parts = tensor.to_ours(array)
        for (path, index), part in zip(tensor.places, parts, strict=True):
            assert part.shape == flat[path][len(index) :]
            assert np.shares_memory(part, array)  # nothing is copied yet
        np.testing.assert_array_equal(tensor.to_theirs(parts), array)


def test_values_of_the_latent_up_projection_by_hand():
    """Rows of kv_b_proj run over heads; inside a head first the keys' width, then the values'."""
    shapes = shapes_of(tiny_v3.get_config())
    m = tiny_v3.get_config().model
    (tensor,) = (t for t in names.tensors(shapes) if t.name == "model.layers.2.self_attn.kv_b_proj.weight")
    rows = m.n_heads * (m.nope_width + m.value_width)
    array = np.arange(rows * m.kv_rank).reshape(rows, m.kv_rank)
    k_up_CHN, v_up_CHU = tensor.to_ours(array)
    for c, h, n in ((0, 0, 0), (3, 1, 5), (7, 3, 31)):
        assert k_up_CHN[c, h, n] == array[h * (m.nope_width + m.value_width) + n, c]
        assert v_up_CHU[c, h, n] == array[h * (m.nope_width + m.value_width) + m.nope_width + n, c]
    blocks = "moe_blocks", "attention"  # layer 0 of tiny_v3 is dense, so its layer 2 is the MoE blocks' second
    assert tensor.places == ((("params", *blocks, "k_up_CHN"), (1,)), (("params", *blocks, "v_up_CHU"), (1,)))


def test_an_expert_of_the_prediction_layer_by_hand():
    shapes = shapes_of(tiny_v3.get_config())
    m = tiny_v3.get_config().model
    tensors = {tensor.name: tensor for tensor in names.tensors(shapes)}
    tensor = tensors[f"model.layers.{m.n_layers}.mlp.experts.3.down_proj.weight"]
    assert tensor.shape == (m.d_model, m.expert_width)
    assert tensor.places == ((("params", "mtp", "0", "block", "experts", "down_XFD"), (3,)),)
    bias = tensors[f"model.layers.{m.n_layers}.mlp.gate.e_score_correction_bias"]
    assert bias.places == ((("router_bias", "mtp", "0", "block", "experts", "router", "bias_E"), ()),)


def test_shared_experts_of_no_width_are_hollow_tensors():
    config = tiny_v3.get_config()
    assert names.empty_tensors(shapes_of(config)) == {}
    config.model.n_shared_experts = 0
    d_model, at = config.model.d_model, "model.layers.{}.mlp.shared_experts.{}_proj.weight"
    assert names.empty_tensors(shapes_of(config)) == {
        at.format(layer, kind): (d_model, 0) if kind == "down" else (0, d_model)
        for layer in range(1, config.model.n_layers + 1)
        for kind in ("gate", "up", "down")
    }
    config.model.n_dense_layers, config.model.mtp_depth = config.model.n_layers, 0
    assert names.empty_tensors(shapes_of(config)) == {}


@pytest.mark.parametrize(
    ("config", "n_tensors", "n_quantized"),
    [
        (v3_671b, 46_183, 45_808),
        (v2_236b, 29_102, None),
        (v2_lite, 5_291, None),
        (moe_16b, 5_466, None),
        (r1_distill_qwen_7b, 339, None),
        (r1_0528_qwen3_8b, 399, None),
    ],
)
def test_numbers_of_published_tensors(config, n_tensors, n_quantized):
    """V2, for example: 60 (2 + 7) + 3 + 59 (1 + 3 + 3 x 160) + 3. V3's index, with scales, has 91,991 names."""
    shapes = shapes_of(config.get_config())
    found = [tensor.name for tensor in names.tensors(shapes)] + list(names.copies(shapes))
    assert len(found) == n_tensors
    if n_quantized:
        assert sum(bool(names.QUANTIZED.search(name)) for name in found) == n_quantized
        assert n_tensors + n_quantized == 91_991


@pytest.mark.parametrize(
    ("name", "is_quantized"),
    [
        ("model.layers.0.self_attn.q_a_proj.weight", True),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.0.mlp.down_proj.weight", True),
        ("model.layers.3.mlp.experts.17.up_proj.weight", True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.61.self_attn.o_proj.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.mlp.gate.e_score_correction_bias", False),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.61.eh_proj.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_is_published_in_8_bits(name, is_quantized):
    assert bool(names.QUANTIZED.search(name)) == is_quantized


def test_letters_are_those_of_the_legend():
    for rule in (*names.BEFORE, *names.MTP, *names.AFTER):
        letters = "".join(itertools.chain(*rule.dimensions, *rule.letters)).replace("|", "")
        assert letters and all(letter in LEGEND for letter in letters), rule
