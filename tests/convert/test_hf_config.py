"""config.json in both spellings: published ones give published numbers, writing is exact, the rest is rejected."""

import copy
import json
import time

import pytest
from ml_collections import ConfigDict

from deepseek_jax.configs import (
    coder_6b7,
    llm_7b,
    llm_67b,
    moe_16b,
    r1_0528_qwen3_8b,
    r1_distill_llama_8b,
    r1_distill_qwen_7b,
    tiny_moe,
    tiny_v1,
    tiny_v2,
    tiny_v2_lite,
    tiny_v3,
    tiny_v32,
    v2_236b,
    v2_lite,
    v3_671b,
    v32_671b,
)
from deepseek_jax.convert.hf_config import facts, from_hf, remarks, to_hf
from deepseek_jax.errors import UserError
from deepseek_jax.models import family

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 102400,
}
SPARSE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 10000,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "scoring_func": "softmax",
    "seq_aux": True,
    "v_head_dim": 128,
}

# As published, or as far as the project knows it: name -> (config.json, our config of the same model).
PUBLISHED = {
    "LLM 7B": (DENSE, llm_7b),
    "LLM 67B": (
        DENSE
        | {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 95}
        | {"num_attention_heads": 64, "num_key_value_heads": 8},
        llm_67b,
    ),
    "Coder 6.7B": (
        DENSE
        | {"num_hidden_layers": 32, "vocab_size": 32256, "max_position_embeddings": 16384, "rope_theta": 100000}
        | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
        coder_6b7,
    ),
    "R1-Distill-Llama 8B": (
        DENSE
        | {"num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}
        | {"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "mlp_bias": False, "attention_bias": False}
        | {
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
        },
        r1_distill_llama_8b,
    ),
    "R1-Distill-Qwen 7B": (
        {key: value for key, value in DENSE.items() if key != "rope_scaling"}
        | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 10000, "vocab_size": 152064}
        | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False}
        | {"use_mrope": False, "max_position_embeddings": 131072},
        r1_distill_qwen_7b,
    ),
    "R1-0528-Qwen3 8B": (
        {key: value for key, value in DENSE.items() if key != "pretraining_tp"}
        | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000000, "vocab_size": 151936}
        | {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128}
        | {"max_position_embeddings": 131072, "attention_bias": False, "attention_dropout": 0.0}
        | {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False}
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
            | {"attn_factor": 0.8782488562869419}
        },
        r1_0528_qwen3_8b,
    ),
    "MoE 16B": (
        DENSE
        | {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "hidden_size": 2048, "rope_theta": 1e4}
        | {"intermediate_size": 10944, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"first_k_dense_replace": 1, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64}
        | {"n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6, "scoring_func": "softmax"},
        moe_16b,
    ),
    "V2-Lite": (
        DENSE
        | SPARSE
        | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048}
        | {"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0}
        | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
        v2_lite,
    ),
    "V2": (
        DENSE
        | SPARSE
        | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 5120}
        | {"intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 60}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0}
        | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
        v2_236b,
    ),
    "V3": (
        DENSE
        | SPARSE
        | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168}
        | {"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_hidden_layers": 61}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 2.5}
        | {"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "norm_topk_prob": True}
        | {"first_k_dense_replace": 3, "n_shared_experts": 1, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1}
        | {"vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1, "quantization_config": FP8}
        | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        v3_671b,
    ),
}
PUBLISHED["V3.2"] = (
    PUBLISHED["V3"][0]
    | {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
    | {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    v32_671b,
)
# Our runs and finished releases differ in these.
NOT_COMPARED = ("init_std", "yarn")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_numbers(name):
    hf, ours = PUBLISHED[name]
    config = ours.get_config()
    found, numbers = from_hf(hf)
    assert found == config.family
    assert numbers.keys() == set(config.model.keys())
    expected = config.model.to_dict()
    assert {key: numbers[key] for key in numbers if key not in NOT_COMPARED} == {
        key: expected[key] for key in expected if key not in NOT_COMPARED
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_of_a_published_config_says_the_same(name):
    hf, _ = PUBLISHED[name]
    kind, numbers = from_hf(hf)
    said = facts(hf)
    quantized = hf["quantization_config"].get("scale_fmt", "fp32") if "quantization_config" in hf else None
    written = to_hf(
        kind, numbers, quantized=quantized, n_positions=said.n_positions, bos_id=said.bos_id, eos_ids=said.eos_ids
    )
    assert from_hf(json.loads(json.dumps(written))) == (kind, numbers)
    assert facts(written) == said
    apart = {key for key in written.keys() & hf.keys() if written[key] != hf[key]}
    # Coder's 100000 is an integer there; Qwen3's YaRN is written with all its numbers and without one that is not read
    assert apart <= {"rope_theta"} | ({"rope_scaling"} if "Qwen3" in name else set())
    # Nothing is lost, except how a release was trained or made.
    made = {"auto_map", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "transformers_version", "use_mrope"}
    made |= {"attention_dropout", "sliding_window", "max_window_layers", "use_sliding_window", "mlp_bias"}
    made |= {"n_group", "topk_group", "topk_method"} if kind == "moe" else set()
    assert hf.keys() - written.keys() - made == set()


@pytest.mark.parametrize("ours", [tiny_moe, tiny_v1, tiny_v2, tiny_v2_lite, tiny_v3, tiny_v32])
def test_our_own_configs_come_back(ours):
    config = ours.get_config()
    written = json.loads(json.dumps(to_hf(config.family, config.model.to_dict())))
    found, numbers = from_hf(written)
    assert (found, numbers) == (config.family, config.model.to_dict())
    family(found)  # and is one that exists


@pytest.mark.parametrize("name", [name for name, (hf, _) in PUBLISHED.items() if hf.get("rope_scaling")])
def test_the_new_spelling_says_the_same(name):
    """transformers 5: both inside rope_parameters, and the type is called rope_type."""
    hf, _ = PUBLISHED[name]
    new = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = dict(hf["rope_scaling"])
    rope["rope_type"] = rope.pop("type", None) or rope["rope_type"]
    new |= {"dtype": "bfloat16", "rope_parameters": rope | {"rope_theta": hf.get("rope_theta", 1e4)}}
    assert from_hf(new) == from_hf(hf)


@pytest.mark.parametrize(("name", "scale"), [("V3", 2.5), ("V2", 1.0), ("MoE 16B", 1.0)])
def test_a_missing_scale_of_the_experts_is_that_of_the_released_code(name, scale):
    hf = {key: value for key, value in PUBLISHED[name][0].items() if key != "routed_scaling_factor"}
    assert from_hf(hf)[1]["route_scale"] == scale


# Other models of the same network; as published, and the numbers of ours that are not V3's.
MOONLIGHT = (
    {"hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64}
    | {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None}
    | {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_experts_per_tok": 6, "routed_scaling_factor": 2.446}
    | {"first_k_dense_replace": 1, "rope_theta": 50000.0, "rope_scaling": None, "vocab_size": 163840}
)
KIMI_K2 = (
    {"model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
    | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
    | {"rope_theta": 50000.0, "num_nextn_predict_layers": 0, "vocab_size": 163840}
    | {"rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1}}
)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (MOONLIGHT, {"q_rank": 0, "n_shared_experts": 2, "n_groups": 1, "route_scale": 2.446, "yarn": {}}),
        (KIMI_K2, {"q_rank": 1536, "n_experts": 384, "n_dense_layers": 1, "mtp_depth": 0, "rope_base": 50000.0}),
        ({"first_k_dense_replace": 0}, {"n_dense_layers": 0}),
        ({"first_k_dense_replace": 61}, {"n_dense_layers": 61}),
        ({"first_k_dense_replace": 100}, {"n_dense_layers": 100}),
        ({"n_shared_experts": 0}, {"n_shared_experts": 0}),
        ({"n_shared_experts": None}, {"n_shared_experts": 0}),
        ({"num_nextn_predict_layers": None}, {"mtp_depth": 0}),
    ],
    ids=str,
)
def test_v3_of_other_layers_is_read_and_written(changed, expected):
    hf = PUBLISHED["V3"][0] | changed
    kind, numbers = from_hf(hf)
    assert kind == "v3" and numbers | expected == numbers
    written = to_hf(kind, numbers)
    assert written["model_type"] == "deepseek_v3"
    assert from_hf(written) == (kind, numbers)
    family(kind).Config.from_config(ConfigDict(numbers))


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, {"mscale": 1.0, "mscale_all_dim": 0.0}),
        ({"mscale": 0.7}, {"mscale": 1.0, "mscale_all_dim": 0.0}),
        ({"mscale_all_dim": 0.7}, {"mscale": 1.0, "mscale_all_dim": 0.0}),
        ({"mscale": 0.7, "mscale_all_dim": 0.5}, {"mscale": 0.7, "mscale_all_dim": 0.5}),
        ({"attention_factor": 1.5, "truncate": False}, {"attention_factor": 1.5, "truncate": False}),
        ({"attention_factor": None, "truncate": True}, {"mscale": 1.0}),
        ({"beta_fast": 1}, {"beta_fast": 1.0, "beta_slow": 1.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["LLM 7B", "R1-Distill-Qwen 7B", "R1-0528-Qwen3 8B"])
def test_yarn_of_dense_models(name, rope, expected):
    """Both temperatures count where both are given, else neither."""
    hf = PUBLISHED[name][0] | {"rope_scaling": YARN | rope}
    kind, numbers = from_hf(hf)
    assert numbers["yarn"] | expected == numbers["yarn"]
    assert numbers["rope_factor"] == 1.0 and numbers["rope_llama3"] == {}
    assert from_hf(to_hf(kind, numbers)) == (kind, numbers)


def test_both_spellings_that_agree_are_read_as_one():
    old = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    new = {"rope_type": "yarn", "rope_theta": 10000.0} | {key: value for key, value in old.items() if key != "type"}
    assert from_hf(V3 | {"rope_scaling": old, "rope_parameters": new}) == from_hf(V3)
    linear = {"type": "linear", "factor": 4.0}
    twice = LLM | {"rope_theta": 5e5, "rope_scaling": linear, "rope_parameters": linear | {"rope_theta": 500000}}
    assert from_hf(twice) == from_hf(LLM | {"rope_theta": 5e5, "rope_scaling": linear})
    with pytest.raises(UserError, match="rope_scaling"):
        from_hf(twice | {"rope_theta": 1e4})


def test_a_width_of_heads_that_is_not_said_is_that_of_the_class():
    hf = PUBLISHED["R1-0528-Qwen3 8B"][0] | {"hidden_size": 2048}
    del hf["head_dim"]
    assert from_hf(hf)[1]["head_width"] == 128
    assert from_hf(LLM | {"hidden_size": 2048})[1]["head_width"] == 64


@pytest.mark.parametrize(
    "windows",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 28},
    ],
    ids=str,
)
def test_windows_that_no_layer_has_are_passed_over(windows):
    hf = PUBLISHED["R1-Distill-Qwen 7B"][0]
    assert from_hf(hf | windows) == from_hf(hf)
    with pytest.raises(UserError, match="use_sliding_window"):
        from_hf(hf | {"use_sliding_window": True, "max_window_layers": 27})


def test_what_is_read_otherwise_elsewhere_is_told_of():
    assert remarks(PUBLISHED["V3"][0]) == []
    (said,) = remarks(PUBLISHED["R1-0528-Qwen3 8B"][0])
    assert "attn_factor=0.878" in said and "attention_factor" in said


def test_biases_and_norms_of_queries_together_are_written_by_nobody():
    numbers = r1_0528_qwen3_8b.get_config().model.to_dict() | {"attention_bias": True}
    with pytest.raises(UserError, match="attention_bias and qk_norm are both set"):
        to_hf("v1", numbers)


def test_yarn_is_kept_as_published():
    assert from_hf(PUBLISHED["V3"][0])[1]["yarn"] == {
        "factor": 40.0,
        "original_length": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def test_yarn_without_mscale_leaves_the_softmax_alone():
    """As in the released code: rotary values take all of the temperature."""
    hf = PUBLISHED["V2"][0] | {"rope_scaling": YARN}
    yarn = from_hf(hf)[1]["yarn"]
    assert (yarn["mscale"], yarn["mscale_all_dim"]) == (1.0, 0.0)


def test_v32_has_an_indexer_in_every_layer():
    hf = PUBLISHED["V3.2"][0]
    as_transformers_writes = {
        "layer_types": ["indexed_attention"] * 61,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
    }
    assert from_hf(hf | as_transformers_writes) == from_hf(hf)
    for changed, key in (
        ({"layer_types": ["full_attention"] * 61}, "layer_types"),
        ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types"),
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"index_head_dim": 32}, "index_head_dim"),
    ):
        with pytest.raises(UserError, match=key):
            from_hf(hf | changed)


def test_a_warm_up_is_written_as_what_it_will_be():
    numbers = v32_671b.get_config().model.to_dict() | {"index_dense": True}
    assert to_hf("v32", numbers) == to_hf("v32", numbers | {"index_dense": False})
    assert from_hf(to_hf("v32", numbers))[1]["index_dense"] is False


def test_scales_of_powers_of_two_are_announced():
    numbers = tiny_v3.get_config().model.to_dict()
    assert to_hf("v3", numbers, quantized="ue8m0")["quantization_config"]["scale_fmt"] == "ue8m0"
    assert "scale_fmt" not in to_hf("v3", numbers, quantized="fp32")["quantization_config"]
    assert "quantization_config" not in to_hf("v3", numbers)
    for scale_fmt in ("ue8m0", None):
        from_hf(PUBLISHED["V3"][0] | {"quantization_config": FP8 | {"scale_fmt": scale_fmt}})


def test_several_end_marks_and_none():
    assert facts(DENSE | {"eos_token_id": [1, 2]}).eos_ids == (1, 2)
    assert facts(DENSE | {"eos_token_id": None, "bos_token_id": None})[1:3] == (None, ())


V3, V2, LLM = (PUBLISHED[name][0] for name in ("V3", "V2", "LLM 7B"))
ROPE = LLM | {"rope_scaling": {"type": "linear", "factor": 4.0}}


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        ({}, "model_type"),
        ({"model_type": "kimi_k25"}, "kimi_k25"),
        ({"model_type": "deepseek_v9"}, "deepseek_v9"),
        ({"model_type": ["llama"]}, "model_type"),
        (LLM | {"hidden_act": "gelu"}, "hidden_act"),
        (LLM | {"attention_bias": True}, "attention_bias"),
        (LLM | {"mlp_bias": True}, "mlp_bias"),
        (LLM | {"use_sliding_window": True}, "use_sliding_window"),
        (LLM | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLM | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLM | {"num_key_value_heads": 5}, "num_key_value_heads"),
        (LLM | {"num_attention_heads": 33, "num_key_value_heads": 33}, "head_dim"),
        (LLM | {"head_dim": 127}, "head_dim"),
        (LLM | {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method"),
        (V3 | {"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, "weight_block_size"),
        (V3 | {"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt"),
        (V3 | {"quantization_config": FP8 | {"scale_fmt": "nvfp4"}}, "scale_fmt"),
        (V3 | {"quantization_config": [FP8]}, "quantization_config"),
        (LLM | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        (PUBLISHED["MoE 16B"][0] | {"rope_scaling": YARN}, "rope_scaling.type"),
        (LLM | {"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type"),
        (LLM | {"rope_parameters": {"rope_type": "default", "factor": 40}}, "rope_parameters.rope_type"),
        (V3 | {"rope_scaling": ROPE["rope_scaling"]}, "rope_scaling.type"),
        (LLM | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        (ROPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        (V3 | {"rope_scaling": YARN | {"attention_factor": 0}}, "rope_scaling.attention_factor"),
        (V3 | {"rope_scaling": YARN | {"truncate": 0}}, "rope_scaling.truncate"),
        (V3 | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "rope_scaling"),
        (V3 | {"rope_scaling": {}, "rope_parameters": YARN}, "rope_scaling"),
        (V3 | {"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor"),
        (V3 | {"rope_scaling": YARN | {"beta_slow": 40}}, "rope_scaling.beta_fast"),
        (V3 | {"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling.original_max_position_embeddings"),
        (V3 | {"rope_scaling": "yarn"}, "rope_scaling"),
        (V3 | {"rope_interleave": False}, "rope_interleave"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func"),
        (V3 | {"topk_method": "greedy"}, "topk_method"),
        (V3 | {"norm_topk_prob": False}, "norm_topk_prob"),
        (V3 | {"q_lora_rank": 0}, "q_lora_rank"),
        (V3 | {"n_group": 7}, "n_group"),
        (V3 | {"topk_group": 9}, "topk_group"),
        (V3 | {"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok"),
        (V3 | {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        (V3 | {"first_k_dense_replace": None}, "first_k_dense_replace"),
        (V3 | {"n_shared_experts": -1}, "n_shared_experts"),
        ({key: value for key, value in V3.items() if key != "n_shared_experts"}, "n_shared_experts"),
        (PUBLISHED["R1-0528-Qwen3 8B"][0] | {"attention_bias": True}, "attention_bias"),
        (V3 | {"num_key_value_heads": 8}, "num_key_value_heads"),
        (V3 | {"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        (V3 | {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        (V3 | {"num_nextn_predict_layers": 5}, "num_nextn_predict_layers"),
        (V2 | {"scoring_func": "sigmoid"}, "scoring_func"),
        (V2 | {"topk_method": "noaux_tc"}, "topk_method"),
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2 | {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V2 | {"moe_layer_freq": True}, "moe_layer_freq"),
        ({key: value for key, value in V2.items() if key != "q_lora_rank"}, "q_lora_rank"),
        (V2 | {"eos_token_id": {"a": 1}}, "eos_token_id"),
        (V2 | {"eos_token_id": [1] * 101}, "eos_token_id"),
        (V2 | {"bos_token_id": -1}, "bos_token_id"),
        (V2 | {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (V2 | {"max_position_embeddings": 2**50}, "max_position_embeddings"),
    ],
)
def test_what_is_not_known_is_refused_by_its_key(hf, named):
    given = copy.deepcopy(hf)
    with pytest.raises(UserError, match=r"config\.json: ") as caught:
        from_hf(hf)
    assert named in str(caught.value)
    assert hf == given  # the argument is not modified


HOSTILE = (None, True, -1, 0, 1.5, 10**4000, float("nan"), float("inf"), "7168", "x" * 10**6, [], {}, [[]] * 1000)


@pytest.mark.parametrize("value", HOSTILE, ids=[repr(value)[:12] for value in HOSTILE])
def test_hostile_values_of_any_key(value):
    """One line that names the key, or a valid value; never another error, and never slow."""
    start = time.process_time()
    for name in ("V3", "R1-Distill-Llama 8B", "R1-0528-Qwen3 8B", "V2-Lite"):
        hf = PUBLISHED[name][0]
        nested = [("rope_scaling", key) for key in hf["rope_scaling"]]
        nested += [("quantization_config", key) for key in hf.get("quantization_config", {})]
        for where, key in [("", key) for key in hf] + nested:
            bad = hf | ({where: hf[where] | {key: value}} if where else {key: value})
            try:
                found = from_hf(bad)
            except UserError as error:
                assert key in str(error) or "head_dim" in str(error) or "q_lora_rank" in str(error)
                assert len(str(error)) < 400 and "\n" not in str(error)
            else:
                assert found[0] in ("v1", "v2", "v3")
    assert time.process_time() - start < 5.0


def test_a_hostile_number_of_layers_and_experts_is_refused():
    for key, value in (("num_hidden_layers", 10**7), ("n_routed_experts", 2**24), ("vocab_size", 2**40)):
        with pytest.raises(UserError, match=key):
            from_hf(V3 | {key: value})


def test_a_family_nobody_publishes_is_not_written():
    with pytest.raises(UserError, match="v9"):
        to_hf("v9", {})
