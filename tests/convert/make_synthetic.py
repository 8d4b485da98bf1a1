"""Writes a checkpoint in the published layout of DeepSeek-V3 with random weights: FP8 blocks, shards, index, MTP.

    python tests/convert/make_synthetic.py DIR                        # V3's widths, 2 layers + MTP, 16 experts: 10 GB
    python tests/convert/make_synthetic.py DIR --experts=64 --layers=4

Every tensor is a function of its name (`content`), so that a test can ask for one without the file. FP8 bytes are
all of E4M3 except its NaNs; scales and other weights have sensible sizes. The MTP layer has copies of embedding and
head, as in the release. Written through 64 MiB at a time, with nothing but numpy.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 128
ROWS_BYTES = 64 * 2**20
WIDTH = {"BF16": 2, "F32": 4, "F8_E4M3": 1}

# The published config.json of V3, with fewer layers and experts.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def tensors(c: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name -> (dtype, shape) of every tensor of a V3 checkpoint of this config, in the published order."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    d, heads = c["hidden_size"], c["num_attention_heads"]

    def plain(name: str, *shape: int, dtype: str = "BF16") -> None:
        found[name] = (dtype, shape)

    def quantised(name: str, *shape: int) -> None:
        plain(f"{name}.weight", *shape, dtype="F8_E4M3")
        plain(f"{name}.weight_scale_inv", *(math.ceil(n / BLOCK) for n in shape), dtype="F32")

    def feed_forward(name: str, width: int) -> None:
        quantised(f"{name}.gate_proj", width, d)
        quantised(f"{name}.up_proj", width, d)
        quantised(f"{name}.down_proj", d, width)

    def block(at: str, is_dense: bool) -> None:
        attention = f"{at}.self_attn"
        plain(f"{at}.input_layernorm.weight", d)
        quantised(f"{attention}.q_a_proj", c["q_lora_rank"], d)
        plain(f"{attention}.q_a_layernorm.weight", c["q_lora_rank"])
        quantised(f"{attention}.q_b_proj", heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]), c["q_lora_rank"])
        quantised(f"{attention}.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], d)
        plain(f"{attention}.kv_a_layernorm.weight", c["kv_lora_rank"])
        quantised(f"{attention}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        quantised(f"{attention}.o_proj", d, heads * c["v_head_dim"])
        plain(f"{at}.post_attention_layernorm.weight", d)
        if is_dense:
            return feed_forward(f"{at}.mlp", c["intermediate_size"])
        plain(f"{at}.mlp.gate.weight", c["n_routed_experts"], d)
        plain(f"{at}.mlp.gate.e_score_correction_bias", c["n_routed_experts"], dtype="F32")
        for expert in range(c["n_routed_experts"]):
            feed_forward(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
        feed_forward(f"{at}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])

    n_layers = c["num_hidden_layers"]
    plain("model.embed_tokens.weight", c["vocab_size"], d)
    for layer in range(n_layers):
        block(f"model.layers.{layer}", layer < c["first_k_dense_replace"])
    plain("model.norm.weight", d)
    plain("lm_head.weight", c["vocab_size"], d)
    for layer in range(n_layers, n_layers + c["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        plain(f"{at}.embed_tokens.weight", c["vocab_size"], d)
        plain(f"{at}.enorm.weight", d)
        plain(f"{at}.hnorm.weight", d)
        plain(f"{at}.eh_proj.weight", d, 2 * d)
        block(at, is_dense=False)
        plain(f"{at}.shared_head.norm.weight", d)
        plain(f"{at}.shared_head.head.weight", c["vocab_size"], d)
    return found


def row_blocks(name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A tensor's rows as raw little-endian numbers, 64 MiB at a time: uint8 for E4M3, uint16 for bfloat16, float32."""
    if name.endswith("embed_tokens.weight"):
        name = "model.embed_tokens.weight"
    if name.endswith("shared_head.head.weight"):
        name = "lm_head.weight"
    rng = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    rest = math.prod(shape[1:])
    rows = max(ROWS_BYTES // (rest * WIDTH[dtype]), 1)
    for start in range(0, shape[0], rows):
        block = (min(rows, shape[0] - start), *shape[1:])
        if dtype == "F32":
            numbers = rng.random(block, np.float32)
            yield numbers * 2e-4 + 1e-5 if name.endswith("scale_inv") else numbers - 0.5
        elif dtype == "F8_E4M3":
            numbers = np.frombuffer(rng.bytes(math.prod(block)), np.uint8).reshape(block)
            yield numbers - ((numbers & 0x7F) == 0x7F)
        else:  # sign, one of 8 exponents that end at 2**-3 (of norms: at 2**0), 7 bits of mantissa
            numbers = np.frombuffer(rng.bytes(2 * math.prod(block)), "<u2").reshape(block)
            lowest = 120 if "norm" in name else 117
            yield (numbers & 0x807F) | ((lowest + ((numbers >> 7) & 7)) << 7).astype("<u2")


def content(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A whole tensor as raw numbers."""
    return np.concatenate(list(row_blocks(name, dtype, shape)))


def write(directory: Path, c: dict, shard_bytes: int = 2_600_000_000) -> None:
    """Writes config.json, the shards and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(c, indent=2))
    described = tensors(c)
    sizes = {name: math.prod(shape) * WIDTH[dtype] for name, (dtype, shape) in described.items()}
    shards, space = [], 0
    for name, size in sizes.items():
        if size > space or not shards:
            shards.append([])
            space = shard_bytes
        shards[-1].append(name)
        space -= size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        write_shard(directory / file, {name: described[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_shard(path: Path, described: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Writes one file of the format: length of the header, header in JSON, bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in described.items():
            for rows in row_blocks(name, dtype, shape):
                rows.tofile(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=V3["num_hidden_layers"], help="without the MTP layer")
    parser.add_argument("--experts", type=int, default=V3["n_routed_experts"])
    given = parser.parse_args()
    write(given.directory, V3 | {"num_hidden_layers": given.layers, "n_routed_experts": given.experts})
