"""Makes the golden files beside it: tiny random models, run by transformers (torch, CPU, float32).

    python tests/golden/make_golden.py [NAME ...]          (torch 2.13, transformers 5.23; all names by default)

Each folder holds what is published of a model, config.json and model.safetensors, and what transformers makes of it:

    oracle.npz  ids         (2, 24) token ids
                logits      (2, 24, V) of the whole sequences
                greedy      (2, 16) what `generate` puts after the first PROMPT ids
                loss        mean cross-entropy of the next token; with MTP, plus MTP_WEIGHT times that of the one after
                gradient    of that loss, for every trained weight: all of them flattened, in the order of their names
                mtp_logits  (2, 23, V) where there is multi-token prediction: position i predicts token i + 2

Nothing is left at its initial value: norms, biases and router biases are random too, so that a lost one shows; for the
same reason three models have an rms_norm_eps that is felt (norms of latents have 1e-6 whatever the config says). Some
configs are spelled as on the hub, others as transformers 5 writes them. Weights are stored in various dtypes, one
model in blocks of FP8; what the oracle computes with is what the file holds.

Settings that hide a difference, and so are not used here (transformers 5.23 against the released code):
  - V2 ignores norm_topk_prob; released configs say false.
  - YaRN with mscale but no mscale_all_dim: transformers scales the rotary values by 0.1 ln(factor) + 1, whatever
    mscale says. Every released config gives both, and equal.
  - V2's gate masks groups by 0 and not by -inf; softmax scores are positive, so it makes no difference.
  - MoE-16B has no class in transformers: it is made here of Llama's attention and V2's greedy mixture of experts.
"""

import copy
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

try:
    from transformers.modeling_layers import MtpModel
except ImportError:  # older than its multi-token prediction: see can_make
    MtpModel = None

HERE = Path(__file__).parent
B, T, PROMPT = 2, 24, 8
MTP_WEIGHT = 0.3

# ---------------------------------------------------------------------------------------------------- configurations

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
    use_cache=True,
)
HUB = dict(attention_bias=False, attention_dropout=0.0, rope_theta=10000.0, rope_scaling=None, torch_dtype="bfloat16")
MOE = dict(
    hidden_size=24,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    moe_intermediate_size=8,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    norm_topk_prob=False,
    scoring_func="softmax",
    aux_loss_alpha=0.001,
    seq_aux=True,
)
MLA = dict(
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=14,
)
YARN = dict(factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
V2 = BASE | HUB | MOE | MLA | dict(model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"])
V3 = BASE | HUB | MOE | MLA | dict(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"])
V3 |= dict(n_shared_experts=1, n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid")
V3 |= dict(norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=0, ep_size=1)
V32 = dict(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"])
V32 |= dict(index_n_heads=16, index_head_dim=12, index_topk=12)
LLAMA = BASE | HUB | dict(model_type="llama", architectures=["LlamaForCausalLM"])
QWEN = BASE | dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
NEAR = dict(original_max_position_embeddings=64, beta_fast=4, beta_slow=1)  # a context in which all of YaRN is felt
FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])

CONFIGS = {
    # DeepSeek-LLM: grouped-query attention.
    "llm": LLAMA | dict(num_key_value_heads=2, rms_norm_eps=0.02),
    # DeepSeek-Coder: linear RoPE scaling.
    "coder": LLAMA | dict(rope_theta=100000, rope_scaling=dict(type="linear", factor=4.0), torch_dtype="float32"),
    # R1-Distill-Llama, as transformers 5 spells it; a context short enough for all three of its frequency bands.
    "r1_llama": BASE
    | dict(model_type="llama", architectures=["LlamaForCausalLM"], num_key_value_heads=1, dtype="float16")
    | dict(
        rope_parameters=dict(rope_theta=10000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0)
        | dict(high_freq_factor=4.0, original_max_position_embeddings=64)
    ),
    # R1-Distill-Qwen: biases of queries, keys and values.
    "r1_qwen": QWEN
    | dict(num_key_value_heads=2, rope_theta=10000, torch_dtype="bfloat16")
    | dict(sliding_window=4096, use_sliding_window=False, max_window_layers=2),
    # DeepSeekMoE-16B: see the note above.
    "moe": BASE | HUB | MOE | dict(model_type="deepseek", architectures=["DeepseekForCausalLM"], num_hidden_layers=3),
    # V2-Lite: no query latent.
    "v2_lite": V2
    | dict(num_hidden_layers=3, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, rms_norm_eps=0.02)
    | dict(routed_scaling_factor=1.0, rope_scaling=YARN | dict(type="yarn", mscale=0.707, mscale_all_dim=0.707)),
    # V2, as transformers 5 spells it.
    "v2": {key: value for key, value in V2.items() if key not in HUB}
    | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, dtype="bfloat16")
    | dict(rope_parameters=YARN | dict(rope_theta=1e4, rope_type="yarn", mscale=0.707, mscale_all_dim=0.707)),
    "v3": V3 | dict(num_hidden_layers=3, rms_norm_eps=0.02),
    # As published: FP8 in blocks of 128 x 128 (the dense layer's width leaves a partial block).
    "v3_yarn": V3
    | dict(intermediate_size=132, quantization_config=FP8)
    | dict(rope_scaling=YARN | dict(type="yarn", mscale=1.0, mscale_all_dim=1.0)),
    # V3.2: sparse attention, which begins while the greedy text is written.
    "v32": V3 | V32 | dict(rope_scaling=NEAR | dict(type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0)),
    "v3_mtp": V3 | dict(num_nextn_predict_layers=1),
    # R1-0528-Qwen3: norms of queries and keys, heads of a width of their own, YaRN whose attn_factor is not read.
    "r1_qwen3": BASE
    | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=12, num_key_value_heads=2)
    | dict(num_hidden_layers=1, rms_norm_eps=0.02, attention_bias=False, torch_dtype="bfloat16", rope_theta=1000000)
    | dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attn_factor=0.878)),
}
NEW_SPELLING = ("r1_llama", "v2")
ONE = V3 | dict(first_k_dense_replace=0, num_hidden_layers=1)
# Compared live only (tests/parity): what else transformers loads of these types.
SHAPES = {
    # DeepSeek-Prover-V2 7B: YaRN in a Llama.
    "prover": LLAMA | dict(rope_scaling=NEAR | dict(type="yarn", factor=16.0, mscale=1.0, mscale_all_dim=1.0)),
    "qwen_yarn": QWEN
    | dict(num_key_value_heads=2, torch_dtype="float16", rope_scaling=NEAR | dict(type="yarn", factor=4.0, mscale=0.7)),
    "yarn_mscales": LLAMA | dict(rope_scaling=NEAR | dict(type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5)),
    "yarn_factor": LLAMA
    | dict(rope_scaling=NEAR | dict(rope_type="yarn", factor=4.0, attention_factor=1.3, truncate=False)),
    # Moonlight: V3 without a latent of queries, without groups; here all layers have experts.
    "moonlight": ONE | dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, routed_scaling_factor=2.446),
    # Kimi K2: YaRN whose band is one pair wide.
    "kimi": ONE
    | dict(model_type="kimi_k2", n_group=1, topk_group=1, rope_theta=50000.0)
    | dict(rope_scaling=NEAR | dict(type="yarn", factor=32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)),
    "no_shared": ONE | dict(n_shared_experts=0),
    # No layer has experts; both spellings of the rotary numbers, which agree.
    "all_dense": V3
    | dict(first_k_dense_replace=2, rope_scaling=NEAR | dict(type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0))
    | dict(rope_parameters=NEAR | dict(rope_type="yarn", factor=4, mscale=1, mscale_all_dim=1, rope_theta=10000.0)),
    # The prediction layer has experts even where no other has.
    "dense_mtp": V3
    | dict(first_k_dense_replace=3, num_nextn_predict_layers=1)
    | dict(rope_scaling=NEAR | dict(type="yarn", factor=4.0, attention_factor=1.3, truncate=False, mscale_all_dim=1.0)),
    "v2_bare": V2
    | dict(first_k_dense_replace=0, n_shared_experts=0, num_hidden_layers=1, topk_method="greedy")
    | dict(n_group=None, topk_group=None, q_lora_rank=None, routed_scaling_factor=1.0),
    "v2_all_dense": V2 | dict(first_k_dense_replace=2, topk_method="greedy", routed_scaling_factor=1.0),
    "moe_bare": CONFIGS["moe"] | dict(first_k_dense_replace=0, n_shared_experts=0, num_hidden_layers=1),
}
FLOAT32 = "e_score_correction_bias"  # kept in float32 by every release


# ------------------------------------------------------------------------------------------------------------ models


def can_make(config: dict) -> bool:
    """Whether the installed transformers has all that a model of this config needs."""
    return hasattr(MtpModel, "forward_layer") or not config.get("num_nextn_predict_layers")


def build(config: dict, seed: int) -> tuple[torch.nn.Module, "MtpModel | None"]:
    """The model of a config and, if it has one, its multi-token prediction; every number random."""
    torch.manual_seed(seed)
    known = dict(config)
    if config["model_type"] == "deepseek":
        known |= dict(model_type="llama", architectures=["LlamaForCausalLM"])
    if config["model_type"] == "kimi_k2":  # the same network: its code for transformers is that of V3
        known |= dict(model_type="deepseek_v3")
    known.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(_parsed(known), dtype=torch.float32)
    if config["model_type"] == "deepseek":
        experts = _parsed(config | dict(model_type="deepseek_v2", topk_method="greedy", routed_scaling_factor=1.0))
        for layer in model.model.layers[config["first_k_dense_replace"] :]:
            layer.mlp = DeepseekV2Moe(experts)
    ahead = None
    if depth := config.get("num_nextn_predict_layers", 0):
        ahead = MtpModel(model, depth)
    randomise(model, seed)
    if ahead:
        randomise(ahead.layers, seed + 1)
    return model.eval(), ahead and ahead.eval()


def _parsed(config: dict) -> transformers.PreTrainedConfig:
    parsed = transformers.AutoConfig.for_model(**copy.deepcopy(config))  # it writes into what it is given
    parsed._experts_implementation = "eager"
    return parsed


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random numbers for all weights: matrices keep the scale of what they multiply, norms lie around one."""
    generator = torch.Generator().manual_seed(seed)
    numbers = list(module.named_parameters()) + [(n, b) for n, b in module.named_buffers() if n.endswith(FLOAT32)]
    with torch.no_grad():
        for name, weight in numbers:
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.2 * noise)
            else:
                weight.copy_(noise if "embed" in name else noise * max(weight.shape[-1], 1) ** -0.5)


def published(model: torch.nn.Module, ahead: "MtpModel | None", of=lambda weight: weight) -> dict[str, torch.Tensor]:
    """Weights under the names of the hub; `of` may take their gradients instead."""
    weights = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith(FLOAT32)}
    n_layers = len(model.model.layers)
    for k, layer in enumerate(ahead.layers if ahead else ()):
        there = f"model.layers.{n_layers + k}."
        tensors = dict(layer.named_parameters()) | {n: b for n, b in layer.named_buffers() if n.endswith(FLOAT32)}
        for name, weight in tensors.items():
            name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            weights[there + name] = weight
    tensors = {}
    for name, weight in weights.items():
        weight = of(weight)
        if weight is None:
            continue
        weight = weight.detach().clone()
        if ".mlp.experts." in name:  # transformers keeps the experts of a layer in one tensor
            for expert, matrix in enumerate(weight):
                parts = matrix.chunk(2) if name.endswith("gate_up_proj") else [matrix]
                kinds = ("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",)
                for kind, part in zip(kinds, parts, strict=True):
                    tensors[f"{name.rpartition('.')[0]}.{expert}.{kind}.weight"] = part.contiguous()
        else:
            tensors[name] = weight
    return tensors


def stored(config: dict, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the file holds: the config's dtype, or FP8 where it says so."""
    dtype = getattr(torch, config.get("torch_dtype") or config["dtype"])
    out = {}
    for name, weight in tensors.items():
        is_linear = weight.ndim == 2 and (".self_attn." in name or ".mlp." in name) and not name.endswith("gate.weight")
        if "quantization_config" in config and is_linear:
            out[name], out[f"{name}_scale_inv"] = to_fp8(weight)
        else:
            out[name] = weight if name.endswith(FLOAT32) else weight.to(dtype)
    for repeated, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        for k in range(config.get("num_nextn_predict_layers", 0)):
            out[f"model.layers.{config['num_hidden_layers'] + k}.{repeated}.weight"] = out[f"{name}.weight"].clone()
    return out


def to_fp8(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 with one float32 factor for each block, the last ones partial."""
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty([-(-n // block) for n in weight.shape])
    for i, j in np.ndindex(*scale.shape):
        at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
        scale[i, j] = weight[at].abs().max() / 448
        q[at] = (weight[at] / scale[i, j]).to(q.dtype)
    return q, scale


def read_back(tensors: dict[str, torch.Tensor], block: int = 128) -> dict[str, torch.Tensor]:
    """The float32 numbers that a reader makes of a file: FP8 times its factor, rounded to bfloat16."""
    out = {}
    for name, weight in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        weight = weight.float()
        if (scale := tensors.get(f"{name}_scale_inv")) is not None:
            whole = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
            weight = (weight * whole[: weight.shape[0], : weight.shape[1]]).bfloat16().float()
        out[name] = weight
    return out


def assign(model: torch.nn.Module, ahead: "MtpModel | None", tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `published`, into the models."""
    n_layers = len(model.model.layers)
    modules = [("", model)]
    modules += [(f"model.layers.{n_layers + k}.", layer) for k, layer in enumerate(ahead.layers if ahead else ())]
    with torch.no_grad():
        for prefix, module in modules:
            for name, weight in [*module.named_parameters(), *module.named_buffers()]:
                there = prefix + name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
                if ".mlp.experts." in there or there.startswith("mlp.experts."):
                    stem, _, kind = there.rpartition(".")
                    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                    for expert in range(weight.shape[0]):
                        weight[expert] = torch.cat([tensors[f"{stem}.{expert}.{kind}.weight"] for kind in kinds])
                elif there in tensors:
                    weight.copy_(tensors[there])


# ------------------------------------------------------------------------------------------------------------ oracle


def oracle(model: torch.nn.Module, ahead: "MtpModel | None", ids: torch.Tensor) -> dict[str, np.ndarray]:
    """What transformers says (see the head of this file), the gradient as a dict of names."""
    model.zero_grad()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # after the final norm
    logits = model.lm_head(hidden)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    said = dict(ids=ids.numpy().astype(np.int32), logits=logits.detach().numpy())
    if ahead:
        ahead.zero_grad()
        positions = torch.arange(T - 1)[None].expand(len(ids), -1)
        hidden = ahead.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
        mtp_logits = ahead._project_to_logits(hidden)
        loss = loss + MTP_WEIGHT * cross_entropy(mtp_logits[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
        said["mtp_logits"] = mtp_logits.detach().numpy()
    loss.backward()
    said["loss"] = loss.detach().numpy()
    said["gradient"] = {name: g.numpy() for name, g in published(model, ahead, of=lambda weight: weight.grad).items()}
    options = dict(max_new_tokens=T - PROMPT, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompt = ids[:, :PROMPT]
    with torch.no_grad():
        new = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    said["greedy"] = new[:, PROMPT:].numpy().astype(np.int32)
    return said


def random_ids(config: dict, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randint(config["vocab_size"], (B, T), generator=generator)


def made(name: str, seed: int) -> tuple[dict, dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """A fresh model of a kind: (config.json, what the file holds, what transformers says)."""
    config = (CONFIGS | SHAPES)[name]
    model, ahead = build(config, seed)
    tensors = stored(config, published(model, ahead))
    assign(model, ahead, read_back(tensors))
    said = oracle(model, ahead, random_ids(config, seed))
    if name in NEW_SPELLING:
        config = json.loads(_parsed(config).to_json_string())
    return config, tensors, said


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor], said: dict[str, np.ndarray]) -> None:
    """The three files of a golden folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    gradient = np.concatenate([said["gradient"][name].ravel() for name in sorted(said["gradient"])])
    np.savez_compressed(folder / "oracle.npz", **said | {"gradient": gradient})


def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # the order of sums, and so the last bits, must not depend on the machine's cores
    for name in names or CONFIGS:
        write(HERE / name, *made(name, seed=list(CONFIGS).index(name)))
        size = sum(file.stat().st_size for file in (HERE / name).iterdir())
        print(f"{name}: {size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
