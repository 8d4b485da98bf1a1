"""Readers and writers of what each family's config.json has beyond sizes and rotary positions.

A reader gets config.json, the numbers read so far and the context extension (`rope.read_rope`), and returns further
numbers of `config.model`. A writer gets all numbers of `config.model` and returns the keys of config.json for them.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.bounds import MOST_POSITIONS
from deepseek_jax.convert.hf_config.fields import boolean, integer, invalid, is_integer, number
from deepseek_jax.convert.hf_config.rope import OBJECTS

MOST_EXPERTS = 200_000  # in all layers together
MOST_MTP_DEPTHS = 4  # every release has one
GREEDY, GROUPED = "greedy", "group_limited_greedy"  # topk_method of V2: without and with groups

Json = Mapping[str, Any]
Numbers = dict[str, Any]


def read_dense(hf: Json, numbers: Numbers, rope: Numbers, default_width: int = 0) -> Numbers:
    """Reads grouped-query attention (`default_width`: see `_read_heads`) and the context extension of v1's models."""
    found = _read_heads(hf, numbers, default_width)
    layer_types = hf.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise invalid(hf, "layer_types", "'full_attention' for every layer")
    if not layer_types and _has_windows(hf):
        raise invalid(hf, "use_sliding_window", "false, or max_window_layers >= num_hidden_layers")
    llama3 = rope if "low_freq_factor" in rope else {}
    yarn = rope if "beta_fast" in rope else {}
    given: Mapping = next((hf[key] for key in OBJECTS if hf.get(key)), {})
    if yarn and not (given.get("mscale") and given.get("mscale_all_dim")):
        yarn = yarn | {"mscale": 1.0, "mscale_all_dim": 0.0}
    linear = 1.0 if llama3 or yarn else rope.get("factor", 1.0)
    return found | {"rope_factor": linear, "rope_llama3": llama3, "yarn": yarn}


def write_dense(numbers: Json) -> Numbers:
    """Writes grouped-query attention."""
    return {"num_key_value_heads": numbers["n_kv_heads"], "head_dim": numbers["head_width"]}


def _read_heads(hf: Json, numbers: Numbers, default_width: int) -> Numbers:
    """Reads key-value heads and the head width: by default `default_width`; if that is 0, hidden_size / heads."""
    n_heads, d_model = numbers["n_heads"], numbers["d_model"]
    n_kv_heads = integer(hf, "num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        raise invalid(hf, "num_key_value_heads", f"a divisor of num_attention_heads={n_heads}")
    if hf.get("head_dim") is None and not default_width and d_model % n_heads:
        raise invalid(hf, "head_dim", f"a width, because hidden_size={d_model} is not a multiple of {n_heads} heads")
    head_width = integer(hf, "head_dim", default=default_width or d_model // n_heads or 1)
    if head_width % 2:
        raise invalid(hf, "head_dim", "an even width, for rotary pairs")
    return {"n_kv_heads": n_kv_heads, "head_width": head_width}


def _has_windows(hf: Json) -> bool:
    """Returns whether some layer attends to a window only: in Qwen's models those from max_window_layers on."""
    if not boolean(hf, "use_sliding_window", False) or hf.get("sliding_window", 4096) is None:
        return False
    return integer(hf, "max_window_layers", default=28, least=0) < hf["num_hidden_layers"]


def read_moe(hf: Json, numbers: Numbers, rope: Numbers) -> Numbers:
    """Reads plain attention, and experts without groups."""
    return _read_heads(hf, numbers, default_width=0) | _read_experts(hf, numbers, default_scale=1.0)


def write_moe(numbers: Json) -> Numbers:
    """Writes plain attention, and experts without groups."""
    return write_dense(numbers) | _write_scale(numbers)


def read_v2(hf: Json, numbers: Numbers, rope: Numbers) -> Numbers:
    """Reads latent attention, and experts chosen by softmax, in groups or not."""
    found = _read_latent(hf, rope) | _read_experts(hf, numbers, default_scale=1.0)
    method = GREEDY if hf.get("topk_method") is None else hf["topk_method"]
    if method not in (GREEDY, GROUPED):
        raise invalid(hf, "topk_method", f"{GREEDY!r} or {GROUPED!r}")
    groups = {"n_groups": "n_group", "top_groups": "topk_group"}
    found |= {ours: integer(hf, theirs) if method == GROUPED else 1 for ours, theirs in groups.items()}
    _check_groups(hf, numbers | found)
    return found


def write_v2(numbers: Json) -> Numbers:
    """Writes latent attention, and experts chosen by softmax, in groups or not."""
    groups = {"n_group": numbers["n_groups"], "topk_group": numbers["top_groups"]}
    method = GROUPED if numbers["n_groups"] > 1 else GREEDY
    return _write_latent(numbers) | _write_scale(numbers) | groups | {"topk_method": method}


def read_v3(hf: Json, numbers: Numbers, rope: Numbers) -> Numbers:
    """Reads latent attention, experts chosen by sigmoid in groups, and multi-token prediction."""
    found = _read_latent(hf, rope) | _read_experts(hf, numbers, default_scale=2.5)
    found["mtp_depth"] = integer(hf, "num_nextn_predict_layers", default=0, least=0, most=MOST_MTP_DEPTHS)
    _check_groups(hf, numbers)
    return found


def write_v3(numbers: Json) -> Numbers:
    """Writes latent attention, the scale of the experts, and multi-token prediction."""
    return _write_latent(numbers) | _write_scale(numbers) | {"num_nextn_predict_layers": numbers["mtp_depth"]}


def read_v32(hf: Json, numbers: Numbers, rope: Numbers) -> Numbers:
    """Reads what V3 has, and checks that all layers have an indexer and the leading ones a dense feed-forward.

    Its attention is sparse; a warm-up, whose is not yet, is written in the same way.
    """
    found, n_layers = read_v3(hf, numbers, rope), numbers["n_layers"]
    if not found["q_rank"]:
        raise invalid(hf, "q_lora_rank", "a width: the indexer reads the latent of the queries")
    if numbers["index_width"] < numbers["rope_width"]:
        raise invalid(hf, "index_head_dim", f"qk_rope_head_dim={numbers['rope_width']} or more")
    n_dense = min(numbers["n_dense_layers"], n_layers)
    expected = {
        "layer_types": ["indexed_attention"] * n_layers,
        "mlp_layer_types": ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense),
    }
    for key, layers in expected.items():
        if hf.get(key) not in (None, layers):
            raise invalid(hf, key, f"{layers[0]!r} to {layers[-1]!r}, as the other keys say, or no such key")
    return found | {"index_dense": False}


WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
SPARSE_RATIO, HEAVY_RATIO = 4, 128  # tokens of an entry, where config.json does not say


def read_v4(hf: Json, numbers: Numbers, rope: Numbers) -> Numbers:
    """Reads V4's schedules of attention and routing, in either spelling, streams, experts, multi-token prediction."""
    if numbers["rope_width"] % 2:
        raise invalid(hf, "qk_rope_head_dim", "an even width, for rotary pairs")
    if numbers["n_heads"] % numbers["out_groups"]:
        raise invalid(hf, "o_groups", f"a divisor of num_attention_heads={numbers['n_heads']}")
    if hf.get("expert_dtype") not in (None, "fp4", "fp8"):
        raise invalid(hf, "expert_dtype", "'fp4', 'fp8' or null")
    depth = integer(hf, "num_nextn_predict_layers", default=0, least=0, most=MOST_MTP_DEPTHS)
    yarn = {key: value for key, value in rope.items() if key in ("factor", "original_length")}
    usual = {"beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {key: rope[key] for key, value in usual.items() if rope.get(key, value) != value}
    return _read_schedule(hf, numbers["n_layers"], depth) | {
        "compress_rope_base": number(hf, "compress_rope_theta", default=160_000.0),
        "yarn": yarn,
        "hyper_eps": number(hf, "hc_eps", default=1e-6),
        "swiglu_limit": number(hf, "swiglu_limit", default=10.0, least=0.0),
        "mtp_depth": depth,
        "index_dense": False,
        **_read_experts(hf, numbers, default_scale=1.5),
    }


def _read_schedule(hf: Json, n_layers: int, depth: int) -> Numbers:
    """Reads the attention of each layer and of each depth, and how many layers have a table of experts."""
    given = hf.get("compress_rates") or {}
    if not isinstance(given, dict) or not all(is_integer(rate, 1, MOST_POSITIONS) for rate in given.values()):
        raise invalid(hf, "compress_rates", f"numbers of tokens for {SPARSE} and {HEAVY}")
    rates = {SPARSE: SPARSE_RATIO, HEAVY: HEAVY_RATIO} | given
    kinds, n = hf.get("layer_types"), n_layers + depth
    ratios: Any = hf.get("compress_ratios")
    is_list = isinstance(ratios, list) and all(is_integer(ratio, 0, MOST_POSITIONS) for ratio in ratios)
    if (kinds is None or ratios is not None) and not (is_list and len(ratios) >= n):
        expected = f"whole numbers of tokens, 0 for a window alone, one for each of {n_layers} + {depth} layers"
        raise invalid(hf, "compress_ratios", expected)
    if kinds is not None:
        named = {WINDOW: 0} | rates
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in named for kind in kinds):
            raise invalid(hf, "layer_types", f"one of {', '.join(named)} for each of {n_layers} layers")
        by_kind = [named[kind] for kind in kinds]  # of the layers alone
        if (ratios or by_kind)[:n_layers] != by_kind:
            raise invalid(hf, "compress_ratios", "what layer_types and compress_rates say, or only one of the two")
        ratios = ratios or by_kind + [0] * depth
    routed = hf.get("mlp_layer_types")
    n_hash = hf.get("num_hash_layers", routed.count("hash_moe") if isinstance(routed, list) else 3)
    if not is_integer(n_hash, 0, n_layers):
        raise invalid(hf, "num_hash_layers", f"a number of layers, at most {n_layers}")
    if routed not in (None, ["hash_moe"] * n_hash + ["moe"] * (n_layers - n_hash)):
        raise invalid(hf, "mlp_layer_types", "'hash_moe' for the leading layers and 'moe' for the others")
    return {"compress_ratios": tuple(ratios), "index_ratio": rates[SPARSE], "n_hash_layers": n_hash}


def write_v4(numbers: Json) -> Numbers:
    """Writes V4's schedules in the hub's spelling, and in that of transformers too where it needs that for them."""
    ratios, sparse = list(numbers["compress_ratios"]), numbers["index_ratio"]
    found = {"compress_ratios": ratios, "num_hash_layers": numbers["n_hash_layers"]}
    found |= {"compress_rope_theta": numbers["compress_rope_base"], "hc_eps": numbers["hyper_eps"]}
    found |= {"swiglu_limit": numbers["swiglu_limit"], "num_nextn_predict_layers": numbers["mtp_depth"]}
    of_layers = ratios[: numbers["n_layers"]]
    heavy = sorted({ratio for ratio in of_layers if ratio not in (0, sparse)})
    if len(heavy) > 1:  # which transformers has no words for
        found |= {"compress_rates": {SPARSE: sparse}} if sparse != SPARSE_RATIO else {}
    elif (sparse, heavy) != (SPARSE_RATIO, [HEAVY_RATIO]):
        rates = {SPARSE: sparse, HEAVY: heavy[0] if heavy else HEAVY_RATIO}
        kinds = {rates[HEAVY]: HEAVY} | {sparse: SPARSE, 0: WINDOW}
        found |= {"layer_types": [kinds[ratio] for ratio in of_layers], "compress_rates": rates}
    return found | _write_scale(numbers)


def _read_latent(hf: Json, rope: Numbers) -> Numbers:
    """Reads latent attention and its context extension."""
    n_heads = hf["num_attention_heads"]
    if hf.get("num_key_value_heads") not in (None, n_heads):
        raise invalid(hf, "num_key_value_heads", f"num_attention_heads={n_heads}: latent attention has no groups")
    if hf["qk_rope_head_dim"] % 2:
        raise invalid(hf, "qk_rope_head_dim", "an even width, for rotary pairs")
    if "q_lora_rank" not in hf:
        raise invalid(hf, "q_lora_rank", "a width, or null for queries without a latent")
    return {"q_rank": 0 if hf["q_lora_rank"] is None else integer(hf, "q_lora_rank"), "yarn": rope}


def _write_latent(numbers: Json) -> Numbers:
    return {"num_key_value_heads": numbers["n_heads"], "q_lora_rank": numbers["q_rank"] or None}


def _read_experts(hf: Json, numbers: Numbers, default_scale: float) -> Numbers:
    """Reads the factor of the routed experts, and checks their number."""
    if numbers["n_layers"] * numbers["n_experts"] > MOST_EXPERTS:
        raise invalid(hf, "n_routed_experts", f"at most {MOST_EXPERTS} in all layers together")
    if numbers["top_k"] > numbers["n_experts"]:
        raise invalid(hf, "num_experts_per_tok", f"at most n_routed_experts={numbers['n_experts']}")
    return {"route_scale": number(hf, "routed_scaling_factor", default=default_scale)}


def _write_scale(numbers: Json) -> Numbers:
    return {"routed_scaling_factor": numbers["route_scale"]}


def _check_groups(hf: Json, numbers: Numbers) -> None:
    """Raises UserError unless the groups divide the experts and hold as many as a token chooses."""
    n_experts, n_groups, top_groups = numbers["n_experts"], numbers["n_groups"], numbers["top_groups"]
    if n_experts % n_groups:
        raise invalid(hf, "n_group", f"a divisor of n_routed_experts={n_experts}")
    if top_groups > n_groups:
        raise invalid(hf, "topk_group", f"at most n_group={n_groups}")
    if numbers["top_k"] > n_experts // n_groups * top_groups:
        raise invalid(hf, "num_experts_per_tok", "no more than there are experts in topk_group groups")
