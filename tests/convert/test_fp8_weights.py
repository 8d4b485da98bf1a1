"""Weights that stay in FP8 as published: the same codes and scales, read or quantised here, and written again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax import run_config
from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.convert import fp8_weights, names, safetensors
from deepseek_jax.errors import UserError
from deepseek_jax.language_model import LanguageModel
from deepseek_jax.precision.fp8_weight import Fp8Weight, Layout
from deepseek_jax.tree import paths

SIZES = {"d_model": 160, "n_layers": 2, "n_heads": 2, "n_experts": 2, "top_k": 1, "n_groups": 1, "top_groups": 1}
SIZES |= {"q_rank": 24, "kv_rank": 32, "nope_width": 16, "rope_width": 8, "value_width": 24, "dense_width": 136}
SIZES |= {"expert_width": 32, "mtp_depth": 1, "vocab_size": 272}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The same model published in bfloat16 and in FP8."""
    config = run_config.load("tiny_v3")
    config.model.update(SIZES)
    shapes, draw = abstract_weights(config), np.random.default_rng(0)
    weights = jax.tree.map(lambda x: jax.device_put(draw.normal(size=x.shape).astype(x.dtype)), shapes)
    folder, model = tmp_path_factory.mktemp("published"), LanguageModel(config, **weights)
    for dtype in ("bf16", "fp8"):
        dsj.save_pretrained(model, folder / dtype, dtype)
        model = dsj.load(folder / "bf16")
    return folder


@pytest.fixture(scope="module")
def stored(directories):
    return dsj.load(directories / "fp8", weights="stored")


def in_fp8(model):
    return {path: leaf for path, leaf in paths(model.params).items() if isinstance(leaf, Fp8Weight)}


@pytest.mark.slow
def test_the_loader_keeps_every_code_and_scale(stored, directories):
    files = safetensors.open_directory(directories / "fp8")
    found, widen = in_fp8(stored), jax.jit(lambda weight: weight.astype(jnp.float32))
    for tensor in names.tensors({"params": stored.params, "router_bias": stored.router_bias}):
        if not files.is_quantized(tensor.name):
            assert not any(path[1:] in found for path, _ in tensor.places), tensor.name
            continue
        wide = files.read_dequantized(tensor.name, np.float32)
        for (path, index), part in zip(tensor.places, tensor.to_ours(wide), strict=True):
            own = jax.tree.map(lambda a, index=index: np.asarray(a)[index], found[path[1:]])
            np.testing.assert_array_equal(widen(own), part)
        if len(tensor.places) == 1:
            np.testing.assert_array_equal(own.codes.view(np.uint8), files.read(tensor.name).view(np.uint8))
            np.testing.assert_array_equal(own.scale, files.read(tensor.name + safetensors.SCALE_SUFFIX))


def test_what_is_held_are_the_bytes_of_codes_and_scales(stored):
    """One byte per weight and 4 per block of 128 x 128, but where two weights share a matrix: there blocks are cut."""
    (gate,) = (leaf for path, leaf in in_fp8(stored).items() if path[-1] == "gate_XDF" and path[0] == "moe_blocks")
    assert gate.nbytes == 1 * 2 * (160 * 32 + 4 * 2)
    arrays = jax.tree.leaves(stored.params)
    sizes = fp8_weights.n_bytes(stored.params)
    assert sum(sizes.values()) == sum(a.nbytes for a in arrays)
    assert sizes["FP8"] == sum(a.nbytes for leaf in in_fp8(stored).values() for a in (leaf.codes, leaf.scale))
    assert "of weights in FP8" in repr(stored)


def test_quantising_here_gives_what_is_published(stored, directories):
    here = in_fp8(dsj.load(directories / "bf16", weights="fp8"))
    there = in_fp8(stored)
    assert here.keys() == there.keys()
    for path, leaf in there.items():
        assert here[path].layout == leaf.layout
        codes, expected = (np.asarray(one.codes).view(np.uint8) for one in (here[path], leaf))
        np.testing.assert_array_equal(codes, expected, err_msg=str(path))
        np.testing.assert_array_equal(here[path].scale, leaf.scale)


def test_an_export_of_weights_in_fp8_has_the_same_codes(stored, directories, tmp_path):
    dsj.save_pretrained(stored, tmp_path / "again", "fp8")
    first, again = (safetensors.open_directory(folder) for folder in (directories / "fp8", tmp_path / "again"))
    for name in first.names():
        if first.is_quantized(name):
            one, other = (files.read(name).view(np.uint8) for files in (first, again))
            np.testing.assert_array_equal(one, other, err_msg=name)
    with pytest.raises(UserError, match="dtype='keep' of weights that are held in FP8"):
        dsj.save_pretrained(stored, tmp_path / "kept", "keep")


def test_an_unknown_format_is_refused(directories):
    with pytest.raises(UserError, match="weights='fp4': .*wide.*stored.*fp8"):
        dsj.load(directories / "fp8", weights="fp4")


def test_v3_as_published():
    """Blocks of 128 rows everywhere, and half the bytes; 671B weights and 11.5B of multi-token prediction."""
    shapes = abstract_weights(run_config.load("v3_671b"))
    pairs = (pair for key, found in fp8_weights.of_model(shapes).items() for pair in zip(key, found, strict=True))
    layouts = {path[-1]: layout for path, layout in pairs}
    assert layouts["k_rope_DP"] == Layout((64,), (7168,), (1, 0)) and layouts["k_rope_DP"].blocks == (1, 56)
    assert layouts["v_up_CHU"] == Layout((128, 128), (512,), (2, 0, 1))
    assert {layout.block_rows for layout in layouts.values()} == {128}
    wide, fp8 = fp8_weights.bytes_to_serve(shapes)
    assert 1.36e12 < wide < 1.37e12 and 0.501 < fp8 / wide < 0.502
