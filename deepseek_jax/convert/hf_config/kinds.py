"""Which model_type is which family, and how its config.json is read and written: one table.

| model_type | family | releases |
| --- | --- | --- |
| llama | v1 | DeepSeek LLM, Coder, Math, Prover; R1-Distill-Llama |
| qwen2 | v1 | R1-Distill-Qwen (biases of queries, keys and values) |
| qwen3 | v1 | R1-0528-Qwen3-8B (norms of queries and keys) |
| deepseek | moe | DeepSeekMoE 16B |
| deepseek_v2 | v2 | V2, V2.5, V2-Lite, Coder-V2 |
| deepseek_v3 | v3 | V3, R1, V3.1; Moonlight |
| deepseek_v32 | v32 | V3.2-Exp, V3.2 |
| deepseek_v4 | v4 | V4-Flash, V4-Pro |
| kimi_k2 | v3 | Kimi K2; written as deepseek_v3, which is the same network |
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_jax.convert.hf_config import families


@dataclass(frozen=True)
class Kind:
    """How a model_type is read and written."""

    family: str  # name in `deepseek_jax.models`
    architecture: str  # class in transformers, or in the release's own code
    sizes: dict[str, str]  # key of config.json -> key of `config.model`; all are integers >= 1 (`COUNTS`: >= 0)
    # `read_extra(hf, numbers, rope)` returns the family's other numbers (see `families`)
    read_extra: Callable[[Mapping[str, Any], dict, dict], dict]
    write_extra: Callable[[Mapping[str, Any]], dict]  # `write_extra(numbers)` returns the keys of config.json for those
    # numbers of `config.model` that the model_type itself implies
    implied: dict[str, Any] = field(default_factory=dict)
    # keys with a single known value, which is also assumed if they are missing; they are written
    fixed: dict[str, Any] = field(default_factory=dict)
    # likewise, but not written, since only some configs have them
    refused: dict[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ()  # context extensions that the family supports
    # classes in the release's own code, for a model_type that transformers does not have
    auto_map: dict[str, str] = field(default_factory=dict)


MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "dense_width",
    "num_attention_heads": "n_heads",
}
LATENT = {
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_width",
    "qk_rope_head_dim": "rope_width",
    "v_head_dim": "value_width",
}
EXPERTS = {
    "first_k_dense_replace": "n_dense_layers",
    "n_routed_experts": "n_experts",
    "n_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "expert_width",
    "num_experts_per_tok": "top_k",
}
INDEXER = {"index_n_heads": "index_heads", "index_head_dim": "index_width", "index_topk": "index_top_k"}
GROUPS = {"n_group": "n_groups", "topk_group": "top_groups"}
COUNTS = ("first_k_dense_replace", "n_shared_experts")
SILU = {"hidden_act": "silu"}
NO_BIAS = SILU | {"attention_bias": False}
SOFTMAX = NO_BIAS | {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1}
SIGMOID = NO_BIAS | {"scoring_func": "sigmoid", "norm_topk_prob": True, "moe_layer_freq": 1, "topk_method": "noaux_tc"}
PLAIN = {"mlp_bias": False, "partial_rotary_factor": 1.0}


def _dense(architecture: str, fixed: dict[str, Any], *, head_width: int = 0, **implied: bool) -> Kind:
    """Returns a dense model of the family v1; `head_width` is head_dim if a config does not give it."""
    return Kind(
        family="v1",
        architecture=architecture,
        sizes=MODEL,
        read_extra=functools.partial(families.read_dense, default_width=head_width),
        write_extra=families.write_dense,
        implied={"attention_bias": False, "qk_norm": False} | implied,
        fixed=fixed,
        refused=PLAIN,
        rope_types=("linear", "llama3", "yarn"),
    )


KINDS = {
    "llama": _dense("LlamaForCausalLM", NO_BIAS),
    "qwen2": _dense("Qwen2ForCausalLM", SILU, attention_bias=True),
    "qwen3": _dense("Qwen3ForCausalLM", NO_BIAS, qk_norm=True, head_width=128),
    "deepseek": Kind(
        family="moe",
        architecture="DeepseekForCausalLM",
        sizes=MODEL | EXPERTS,
        read_extra=families.read_moe,
        write_extra=families.write_moe,
        fixed=SOFTMAX,
        refused=PLAIN | {"topk_method": "greedy"},
        auto_map={
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
    ),
    "deepseek_v2": Kind(
        family="v2",
        architecture="DeepseekV2ForCausalLM",
        sizes=MODEL | LATENT | EXPERTS,
        read_extra=families.read_v2,
        write_extra=families.write_v2,
        fixed=SOFTMAX,
        refused=PLAIN,
        rope_types=("yarn",),
    ),
    "deepseek_v3": Kind(
        family="v3",
        architecture="DeepseekV3ForCausalLM",
        sizes=MODEL | LATENT | EXPERTS | GROUPS,
        read_extra=families.read_v3,
        write_extra=families.write_v3,
        fixed=SIGMOID,
        refused=PLAIN | {"rope_interleave": True},
        rope_types=("yarn",),
    ),
}
KINDS["deepseek_v32"] = replace(
    KINDS["deepseek_v3"],
    family="v32",
    architecture="DeepseekV32ForCausalLM",
    sizes=KINDS["deepseek_v3"].sizes | INDEXER,
    read_extra=families.read_v32,
)
KINDS["deepseek_v4"] = Kind(
    family="v4",
    architecture="DeepseekV4ForCausalLM",
    sizes={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "head_dim": "head_width",
        "qk_rope_head_dim": "rope_width",
        "q_lora_rank": "q_rank",
        "o_groups": "out_groups",
        "o_lora_rank": "out_rank",
        "sliding_window": "window",
        "hc_mult": "n_streams",
        "hc_sinkhorn_iters": "sinkhorn_steps",
        **INDEXER,
        **{theirs: ours for theirs, ours in EXPERTS.items() if ours != "n_dense_layers"},
    },
    read_extra=families.read_v4,
    write_extra=families.write_v4,
    fixed=NO_BIAS | {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "num_key_value_heads": 1},
    refused={"topk_method": "noaux_tc", "mlp_bias": False},
    rope_types=("yarn",),
)
KINDS["kimi_k2"] = KINDS["deepseek_v3"]
