"""Adapters in PEFT's files: names, shapes, and back without a changed bit; other kinds are refused."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.configs import tiny_v1, tiny_v4
from deepseek_jax.convert import peft, safetensors
from deepseek_jax.errors import UserError
from deepseek_jax.layers import lora
from deepseek_jax.layers.base import split
from deepseek_jax.models import family

RANK, ALPHA = 3, 6.0


def shapes_of(name, sizes):
    module = family(name)
    _, params, router_bias = split(
        nnx.eval_shape(lambda: module.Model(module.Config.from_config(sizes), rngs=nnx.Rngs(0)))
    )
    return {"params": params, "router_bias": router_bias}


@pytest.fixture(scope="module")
def v3(tiny_sizes):
    return shapes_of("v3", tiny_sizes)


@pytest.fixture
def written(v3, tmp_path):
    """(directory, adapters, path -> array of all layers)."""
    found, rng = peft.lora(v3, RANK, ALPHA, "all-linear"), np.random.default_rng(0)
    shapes = lora.abstract_adapters(v3["params"], found)
    arrays = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
    peft.write(tmp_path / "a", "the/base", v3, found, lambda path, layer: arrays[path][layer])
    return tmp_path / "a", found, arrays


def test_names_and_shapes(written):
    """B's rows and A's columns are those of the published matrix."""
    directory, found, arrays = written
    tensors = safetensors.Tensors(directory, {peft.WEIGHTS: None})
    start = "base_model.model.model.layers."
    for name, n_out, n_in in (
        ("0.self_attn.q_a_proj", 16, 32),
        ("1.self_attn.kv_a_proj_with_mqa", 16 + 8, 32),
        ("2.self_attn.kv_b_proj", 2 * (8 + 8), 16),
        ("2.self_attn.o_proj", 32, 2 * 8),
    ):
        assert tensors.info(f"{start}{name}.lora_A.weight") == ("F32", (RANK, n_in))
        assert tensors.info(f"{start}{name}.lora_B.weight") == ("F32", (n_out, RANK))
    assert len(tensors.names()) == 2 * 3 * 5
    down = arrays["moe_blocks", "adapters", "self_attn_o_proj", "down"]
    np.testing.assert_array_equal(tensors.read(f"{start}2.self_attn.o_proj.lora_A.weight"), down[1].T)
    said = json.loads((directory / peft.CONFIG).read_text())
    assert "q_a_proj" in said["target_modules"] and len(said["target_modules"]) == 5
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (RANK, ALPHA, "the/base")
    assert found.scale == 2.0


def test_back_without_a_changed_bit(v3, written):
    directory, found, arrays = written
    said = peft.settings(directory)
    assert peft.lora(v3, said["rank"], said["alpha"], said["targets"]) == found
    back = peft.read(directory, v3, found)
    assert back.keys() == arrays.keys()
    for path, array in back.items():
        np.testing.assert_array_equal(array, arrays[path])


def test_feed_forwards_take_adapters_in_dense_models():
    dense = shapes_of("v1", tiny_v1.get_config().model)
    found = peft.lora(dense, 2, 4.0, "v_proj, down_proj")
    assert [target.name for _, targets in found.blocks for target in targets] == ["self_attn_v_proj", "mlp_down_proj"]


def test_names_that_no_matrix_has(v3):
    with pytest.raises(
        UserError, match="no matrix gate_proj that takes adapters. Give all-linear, or some of kv_a_proj"
    ):
        peft.lora(v3, RANK, ALPHA, "q_a_proj,gate_proj")


def test_v4_has_the_names_of_transformers_and_a_pattern_that_passes_by_compressors_and_indexers(tmp_path):
    """One adapter for each layer of a group that repeats; compressors have a kv_proj, indexers a q_b_proj."""
    sizes = tiny_v4.get_config().model
    shapes = shapes_of("v4", sizes)
    found = peft.lora(shapes, 2, 4.0, "all-linear")
    made = lora.abstract_adapters(shapes["params"], found)
    assert len(dict(found.blocks)["blocks_1", "blocks", "1"]) == 4
    peft.write(tmp_path / "a", "the/base", shapes, found, lambda path, layer: np.zeros(made[path].shape[1:]))
    names = safetensors.Tensors(tmp_path / "a", {peft.WEIGHTS: None}).names()
    assert len(names) == 2 * 4 * sizes.n_layers
    assert "base_model.model.model.layers.4.self_attn.o_b_proj.lora_B.weight" in names
    pattern = json.loads((tmp_path / "a" / peft.CONFIG).read_text())["target_modules"]
    for name, is_ours in (
        ("kv_proj", 1),
        ("compressor.kv_proj", 0),
        ("compressor.indexer.q_b_proj", 0),
        ("o_a_proj", 0),
    ):
        assert bool(re.fullmatch(pattern, f"model.layers.1.self_attn.{name}")) == is_ours
    assert peft.lora(shapes, 2, 4.0, peft.settings(tmp_path / "a")["targets"]) == found


def test_a_model_none_of_whose_matrices_takes_adapters():
    """Of V4's attention, gains and sinks are no matrices."""
    attention = {"sink_H": jax.ShapeDtypeStruct((1, 8), np.float32)}
    shapes = {"params": {"streams_head": {}, "blocks_0": {"attention": attention}}, "router_bias": {}}
    with pytest.raises(UserError, match=r"lora.rank=2: no matrix of this model takes adapters"):
        peft.lora(shapes, 2, 4.0, "all-linear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True, expected it unset. Adapters of other kinds are not supported"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"bias": "all"}, "bias='all', expected 'none'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', expected True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
        ({"of_a_later_version": {"a": 1}}, r"of_a_later_version=\{'a': 1\}, expected it unset"),
        ({"r": 0}, "r=0 and lora_alpha=6.0, expected a rank from 1 on"),
    ],
)
def test_adapters_of_other_kinds_are_refused(written, change, message):
    path = written[0] / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        peft.settings(written[0])


def test_adapters_of_another_model_are_refused(v3, written, tmp_path):
    directory, found, arrays = written
    with pytest.raises(UserError, match=r"lora_A of self_attn_\w+ is \[3, 32\], expected \[4, 32\] for this model"):
        peft.read(directory, v3, peft.lora(v3, 4, ALPHA, "all-linear"))
    with pytest.raises(UserError, match="belongs to no matrix of this model"):
        peft.read(directory, v3, peft.lora(v3, RANK, ALPHA, "o_proj"))
    fewer = peft.lora(v3, RANK, ALPHA, "o_proj")
    peft.write(tmp_path / "b", "", v3, fewer, lambda path, layer: arrays[path][layer])
    with pytest.raises(UserError, match="is missing. Adapters must be in every layer"):
        peft.read(tmp_path / "b", v3, found)
    with pytest.raises(UserError, match="adapter_config.json: cannot be read"):
        peft.settings(tmp_path)


def test_what_peft_writes_beside_is_read_over(written):
    """All keys of PEFT 0.21 that do not say what the adapters compute."""
    path = written[0] / peft.CONFIG
    said = json.loads(path.read_text())
    others = {"peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16, "lora_dropout": 0.1}
    others |= {"init_lora_weights": "gaussian", "layer_replication": None, "use_qalora": False, "rank_pattern": {}}
    path.write_text(json.dumps(said | others))
    assert peft.settings(written[0])["rank"] == RANK
    path.write_text("[]")
    with pytest.raises(UserError, match="holds no settings of adapters"):
        peft.settings(written[0])
