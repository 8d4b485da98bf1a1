"""A published config.json as a family and its numbers, and back.

Read are the spelling of the hub (rope_theta and rope_scaling side by side) and that of transformers 5 (both inside
rope_parameters); written is the hub's, which both old and new software reads.  Keys that change what a
model_type computes, in the released code or in transformers, are refused where their value is not known here; keys that
neither reads are passed over.

| model_type | family | releases |
| --- | --- | --- |
| llama | v1 | DeepSeek LLM, Coder, Math, Prover; R1-Distill-Llama |
| qwen2 | v1 | R1-Distill-Qwen (biases of queries, keys and values) |
| qwen3 | v1 | R1-0528-Qwen3-8B (norms of queries and keys) |
| deepseek | moe | DeepSeekMoE 16B |
| deepseek_v2 | v2 | V2, V2.5, V2-Lite, Coder-V2 |
| deepseek_v3 | v3 | V3, R1, V3.1; Moonlight |
| kimi_k2 | v3 | Kimi K2; written as deepseek_v3, which is the same network |

YaRN scales the rotary values by attention_factor; where that is not given, by the ratio of the temperatures
0.1 m ln(factor) + 1 of mscale and of mscale_all_dim.
  - Latent attention: mscale is 1 and mscale_all_dim 0 unless given, as in the released code, and the softmax scale
    grows by the square of the latter's temperature.  Every released config gives both, and equal: the values stay as
    they are.
  - Dense models: both count where both are given, else neither, as in transformers: the ratio is 0.1 ln(factor) + 1.
    R1-0528-Qwen3-8B gives attn_factor, which vLLM multiplies the ratio with (to 1) and transformers does not read;
    here it is not read either, and `remarks` says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepseek_jax.bounds import LARGEST, MOST_LAYERS, MOST_POSITIONS
from deepseek_jax.convert import formats
from deepseek_jax.errors import UserError
from deepseek_jax.layers.rope import Yarn

MOST_EXPERTS = 200_000  # in all layers together
MOST_AHEAD = 4  # depths of multi-token prediction; every release has one
MOST_ENDS = 100


@dataclass(frozen=True)
class Kind:
    """How a model_type is read and written.

    Attributes:
        family: name in `deepseek_jax.models`.
        architecture: class in transformers, or in the release's own code.
        sizes: key of config.json -> key of `config.model`, all of them integers, 1 or more (`COUNTS`: 0 or more).
        fixed: keys that are known with one value only (also assumed where they are missing), and written.
        refused: likewise, but not written: they stand in some configs only.
        rope_types: context extensions that the family has.
        route_scale: routed_scaling_factor where a config does not say.
        auto_map: classes in the release's own code, of a model_type for which transformers has none.
        head_width: head_dim where a config does not say; 0 for hidden_size / num_attention_heads.
    """

    family: str
    architecture: str
    sizes: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ()
    route_scale: float = 1.0
    head_width: int = 0
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
COUNTS = ("first_k_dense_replace", "n_shared_experts")
SILU = {"hidden_act": "silu"}
NO_BIAS = SILU | {"attention_bias": False}
SOFTMAX = NO_BIAS | {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1}
SIGMOID = NO_BIAS | {"scoring_func": "sigmoid", "norm_topk_prob": True, "moe_layer_freq": 1, "topk_method": "noaux_tc"}
PLAIN = {"mlp_bias": False, "partial_rotary_factor": 1.0}
DENSE_ROPE = ("linear", "llama3", "yarn")

KINDS = {
    "llama": Kind("v1", "LlamaForCausalLM", MODEL, NO_BIAS, PLAIN, DENSE_ROPE),
    "qwen2": Kind("v1", "Qwen2ForCausalLM", MODEL, SILU, PLAIN, DENSE_ROPE),
    "qwen3": Kind("v1", "Qwen3ForCausalLM", MODEL, NO_BIAS, PLAIN, DENSE_ROPE, head_width=128),
    "deepseek": Kind(
        "moe",
        "DeepseekForCausalLM",
        MODEL | EXPERTS,
        SOFTMAX,
        PLAIN | {"topk_method": "greedy"},
        auto_map={
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
    ),
    "deepseek_v2": Kind("v2", "DeepseekV2ForCausalLM", MODEL | LATENT | EXPERTS, SOFTMAX, PLAIN, ("yarn",)),
    "deepseek_v3": Kind(
        "v3",
        "DeepseekV3ForCausalLM",
        MODEL | LATENT | EXPERTS | {"n_group": "n_groups", "topk_group": "top_groups"},
        SIGMOID,
        PLAIN | {"rope_interleave": True},
        ("yarn",),
        route_scale=2.5,
    ),
}
KINDS["kimi_k2"] = KINDS["deepseek_v3"]
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "truncate")
ROPE_KEYS += ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ROPE_KEYS += ("attention_factor", "attn_factor", "partial_rotary_factor")
ROPES = ("rope_parameters", "rope_scaling")  # where context extension stands: transformers 5, the hub
TOLD_BY = {"attention_bias": "qwen2", "qk_norm": "qwen3"}  # number of the dense family -> the model_type that has it
GREEDY, GROUPED = "greedy", "group_limited_greedy"  # topk_method of V2: without and with groups
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


class Facts(NamedTuple):
    """What a config.json says besides the numbers of the model.

    Attributes:
        n_positions: longest sequence that the release is meant for.
        bos_id, eos_ids: marks of begin and end; None, and empty, where not said.
        is_tied: the head is the embedding, transposed, and not stored.
        pad_id: mark of padding, likewise.
    """

    n_positions: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    is_tied: bool
    pad_id: int | None = None


# ----------------------------------------------------------------------------------------------------------- reading


def from_hf(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family of a config.json and its numbers: all keys of `config.model`, groups of them as plain dicts.

    Raises:
        UserError: naming the key that is missing, of a wrong type, out of range, or not known with its value.
    """
    kind = _kind(hf)
    for key, value in (kind.fixed | kind.refused).items():
        if hf.get(key) is not None and (hf[key] != value or isinstance(hf[key], bool) != isinstance(value, bool)):
            raise _refusal(hf, key, f"{value!r}, the only one known for model_type {hf['model_type']!r}")
    numbers = {ours: _size(hf, theirs) for theirs, ours in kind.sizes.items()}
    if numbers["n_layers"] > MOST_LAYERS:
        raise _refusal(hf, "num_hidden_layers", f"at most {MOST_LAYERS}")
    numbers["norm_eps"] = _number(hf, "rms_norm_eps", default=1e-6)
    numbers["init_std"] = _number(hf, "initializer_range", default=0.02)
    _check_quantization(hf)
    theta, rope = _rope(hf, kind.rope_types)
    numbers["rope_base"] = theta
    if kind.family in ("v1", "moe"):
        numbers |= _heads(hf, numbers, kind)
    else:
        numbers |= _latent(hf, rope)
    if kind.family == "v1":
        numbers |= _dense(hf, rope)
    else:
        numbers |= _experts(hf, numbers, kind)
    facts(hf)
    return kind.family, numbers


def facts(hf: Mapping[str, Any]) -> Facts:
    """What a config.json says besides the numbers. Raises UserError naming the key."""
    tied = hf.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _refusal(hf, "tie_word_embeddings", "true or false")
    n_positions = _integer(hf, "max_position_embeddings", default=4096, most=MOST_POSITIONS)
    pad = hf.get("pad_token_id")
    pad = pad if _is_integer(pad, 0, LARGEST) else None  # -1 in some releases: none
    return Facts(n_positions, _bos_id(hf), eos_ids(hf), tied, pad)


def eos_ids(hf: Mapping[str, Any], where: str = "config.json") -> tuple[int, ...]:
    """The marks of end that a config.json or generation_config.json names, in its order. Raises UserError."""
    eos = hf.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    if len(ids) > MOST_ENDS or not all(_is_integer(value, 0, LARGEST) for value in ids if value is not None):
        raise UserError(f"{where}: eos_token_id={shown(eos)}: expected a token id, a short list of them, or null.")
    return tuple(value for value in ids if value is not None)


def one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    """Ids as these files spell them: one alone, more as a list, null for none."""
    return ids[0] if len(ids) == 1 else list(ids) or None


def _bos_id(hf: Mapping[str, Any]) -> int | None:
    bos = hf.get("bos_token_id")
    if bos is not None and not _is_integer(bos, 0, LARGEST):
        raise _refusal(hf, "bos_token_id", "a token id or null")
    return bos


def _kind(hf: Mapping[str, Any]) -> Kind:
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"config.json: model_type={shown(kind)}: no family here computes that. Known are {', '.join(KINDS)}."
        )
    return KINDS[kind]


def remarks(hf: Mapping[str, Any]) -> list[str]:
    """What a user should know of a config.json that `from_hf` reads."""
    ropes = [hf[key] for key in ROPES if isinstance(hf.get(key), dict)]
    factors = [rope["attn_factor"] for rope in ropes if rope.get("attn_factor") not in (None, 1)]
    if not factors:
        return []
    return [
        f"rope_scaling.attn_factor={shown(factors[0])} is not read, as in transformers; vLLM multiplies the rotary "
        f"values by it. For what vLLM computes, replace it by attention_factor, its product with 0.1 ln(factor) + 1."
    ]


def _size(hf: Mapping[str, Any], key: str) -> int:
    """A size, or a count that may be 0; a null n_shared_experts is none, as in the released code."""
    if key == "n_shared_experts" and key in hf and hf[key] is None:
        return 0
    return _integer(hf, key, least=0 if key in COUNTS else 1)


def _heads(hf: Mapping[str, Any], numbers: dict, kind: Kind) -> dict:
    """Plain attention: key-value heads and head width."""
    n_heads = numbers["n_heads"]
    n_kv_heads = _integer(hf, "num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        raise _refusal(hf, "num_key_value_heads", f"a divisor of num_attention_heads={n_heads}")
    if hf.get("head_dim") is None and not kind.head_width and numbers["d_model"] % n_heads:
        raise _refusal(hf, "head_dim", f"a width: hidden_size {numbers['d_model']} is no multiple of {n_heads} heads")
    head_width = _integer(hf, "head_dim", default=kind.head_width or numbers["d_model"] // n_heads or 1)
    if head_width % 2:
        raise _refusal(hf, "head_dim", "an even width, for rotary pairs")
    return {"n_kv_heads": n_kv_heads, "head_width": head_width}


def _dense(hf: Mapping[str, Any], rope: dict) -> dict:
    """What a dense model has besides."""
    layer_types = hf.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise _refusal(hf, "layer_types", "'full_attention' throughout")
    if not layer_types and _slides(hf):
        raise _refusal(hf, "use_sliding_window", "false, or max_window_layers of num_hidden_layers or more")
    llama3 = rope if "low_freq_factor" in rope else {}
    yarn = rope if "beta_fast" in rope else {}
    said = next((hf[key] for key in ROPES if hf.get(key)), {})
    if yarn and not (said.get("mscale") and said.get("mscale_all_dim")):
        yarn = yarn | {"mscale": 1.0, "mscale_all_dim": 0.0}
    linear = 1.0 if llama3 or yarn else rope.get("factor", 1.0)
    kinds = {"attention_bias": hf["model_type"] == "qwen2", "qk_norm": hf["model_type"] == "qwen3"}
    return kinds | {"rope_factor": linear, "rope_llama3": llama3, "yarn": yarn}


def _slides(hf: Mapping[str, Any]) -> bool:
    """Whether a layer looks at a window only: of Qwen's, those from max_window_layers on, if windows are used."""
    used = hf.get("use_sliding_window", False)
    if not isinstance(used, bool):
        raise _refusal(hf, "use_sliding_window", "true or false")
    if not used or hf.get("sliding_window", 4096) is None:
        return False
    return _integer(hf, "max_window_layers", default=28, least=0) < hf["num_hidden_layers"]


def _latent(hf: Mapping[str, Any], rope: dict) -> dict:
    """Latent attention, and its context extension."""
    n_heads = hf["num_attention_heads"]
    if hf.get("num_key_value_heads") not in (None, n_heads):
        raise _refusal(hf, "num_key_value_heads", f"num_attention_heads={n_heads}: latent attention has no groups")
    if hf["qk_rope_head_dim"] % 2:
        raise _refusal(hf, "qk_rope_head_dim", "an even width, for rotary pairs")
    if "q_lora_rank" not in hf:
        raise _refusal(hf, "q_lora_rank", "a width, or null for queries without a latent")
    q_rank = 0 if hf["q_lora_rank"] is None else _integer(hf, "q_lora_rank")
    return {"q_rank": q_rank, "yarn": rope}


def _experts(hf: Mapping[str, Any], numbers: dict, kind: Kind) -> dict:
    """How experts are chosen."""
    if numbers["n_layers"] * numbers["n_experts"] > MOST_EXPERTS:
        raise _refusal(hf, "n_routed_experts", f"at most {MOST_EXPERTS} in all layers together")
    found = {"route_scale": _number(hf, "routed_scaling_factor", default=kind.route_scale)}
    if kind.family == "v2":
        method = GREEDY if hf.get("topk_method") is None else hf["topk_method"]
        if method not in (GREEDY, GROUPED):
            raise _refusal(hf, "topk_method", f"{GREEDY!r} or {GROUPED!r}")
        groups = {"n_groups": "n_group", "top_groups": "topk_group"}
        found |= {ours: _integer(hf, theirs) if method == GROUPED else 1 for ours, theirs in groups.items()}
    if kind.family == "v3":
        found["mtp_depth"] = _integer(hf, "num_nextn_predict_layers", default=0, least=0, most=MOST_AHEAD)
    chosen = {"n_groups": 1, "top_groups": 1} | numbers | found
    n_groups, top_groups = chosen["n_groups"], chosen["top_groups"]
    if numbers["n_experts"] % n_groups:
        raise _refusal(hf, "n_group", f"a divisor of n_routed_experts={numbers['n_experts']}")
    if top_groups > n_groups:
        raise _refusal(hf, "topk_group", f"at most n_group={n_groups}")
    if numbers["top_k"] > numbers["n_experts"] // n_groups * top_groups:
        raise _refusal(hf, "num_experts_per_tok", "no more than there are experts in topk_group groups")
    return found


def _rope(hf: Mapping[str, Any], known: tuple[str, ...]) -> tuple[float, dict]:
    """(base, numbers of the context extension: those of `Yarn`, of `Llama3`, a factor, or none), of either spelling."""
    given = {key: hf[key] for key in ROPES if hf.get(key) is not None}
    if wrong := [key for key, value in given.items() if not isinstance(value, dict)]:
        raise _refusal(hf, wrong[0], "an object or null")
    found = [_rope_of(hf, rope, f"{key}.", known) for key, rope in given.items()] or [_rope_of(hf, {}, "", known)]
    if found[0] != found[-1]:
        raise _refusal(hf, "rope_scaling", "what rope_parameters beside it says, or one of the two alone")
    return found[0]


def _rope_of(hf: Mapping[str, Any], rope: dict, where: str, known: tuple[str, ...]) -> tuple[float, dict]:
    """What one of the two objects says, `rope` at `where`; the base may stand beside it."""
    if unknown := [key for key in rope if key not in ROPE_KEYS]:
        raise UserError(
            f"config.json: {where}{shown(unknown[0])}: no such key is known. Known are {', '.join(ROPE_KEYS)}."
        )
    base = _number(rope if "rope_theta" in rope else hf, "rope_theta", default=10_000.0, where=where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *known):
        known_types = ", ".join(("default", *known))
        raise _refusal(rope, "rope_type" if "rope_type" in rope else "type", f"one of {known_types}", where)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(rope, "partial_rotary_factor", "1.0, or nothing", where)
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise _refusal(rope, "rope_type", "the kind of extension that its factor belongs to", where)
        return base, {}
    found = {"factor": _number(rope, "factor", least=1.0, where=where)}
    if kind == "linear":
        return base, found
    original = _integer(rope, "original_max_position_embeddings", most=MOST_POSITIONS, where=where)
    if kind == "llama3":
        found |= {key: _number(rope, key, where=where) for key in ("low_freq_factor", "high_freq_factor")}
        if found["high_freq_factor"] <= found["low_freq_factor"]:
            raise _refusal(rope, "high_freq_factor", "more than low_freq_factor", where)
        return base, found | {"original_length": original}
    return base, found | {"original_length": original} | _yarn(rope, where)


def _yarn(rope: dict, where: str) -> dict:
    """The numbers of `Yarn` besides the factor and the original length; its last two only where they are given."""
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    found = {key: _number(rope, key, default=value, least=0.0, where=where) for key, value in defaults.items()}
    if not found["beta_fast"] >= found["beta_slow"] > 0:
        raise _refusal(rope, "beta_fast", "beta_slow or more, and that more than 0", where)
    if rope.get("attention_factor") is not None:
        found["attention_factor"] = _number(rope, "attention_factor", where=where)
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise _refusal(rope, "truncate", "true or false", where)
    return found if truncate else found | {"truncate": False}


def _check_quantization(hf: Mapping[str, Any]) -> None:
    """Raises UserError for anything but DeepSeek's FP8 in blocks of 128 x 128."""
    formats.check_bits(hf)
    found = hf.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, dict):
        raise _refusal(hf, "quantization_config", "an object or null")
    for key, value in FP8.items():
        needed = key in found or key in ("quant_method", "weight_block_size")
        if key != "activation_scheme" and needed and found.get(key) != value:
            raise _refusal(found, key, f"{value!r}, DeepSeek's FP8", "quantization_config.")
    if found.get("scale_fmt") not in (None, "ue8m0", "float"):
        raise _refusal(found, "scale_fmt", "'ue8m0' or nothing", "quantization_config.")


def _is_integer(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _integer(hf: Mapping, key: str, default: int | None = None, least=1, most: int = LARGEST, where: str = "") -> int:
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if not _is_integer(value, least, most):
        raise _refusal(hf, key, f"an integer from {least:,} to {most:,}", where)
    return value


def _number(hf: Mapping, key: str, default: float | None = None, least: float | None = None, where: str = "") -> float:
    """A finite number, above 0 unless `least` says otherwise."""
    value = hf.get(key)
    if value is None and default is not None:
        return default
    lawful = type(value) in (int, float) and abs(value) <= 1e15 and math.isfinite(value)
    if not lawful or (value <= 0 if least is None else value < least):
        raise _refusal(hf, key, "a number above 0" if least is None else f"a number, {least:g} or more", where)
    return float(value)


def _refusal(hf: Mapping, key: str, wanted: str, where: str = "") -> UserError:
    given = f"{where}{key}={shown(hf[key])}" if key in hf else f"no {where}{key}"
    return UserError(f"config.json: {given}: wanted {wanted}.")


def shown(value: object) -> str:
    """A value on one short line, however large it is."""
    if isinstance(value, (dict, list)):
        return f"a {'object' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return "a huge integer"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:59] + "…"


# ----------------------------------------------------------------------------------------------------------- writing


def to_hf(
    family: str,
    numbers: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    quantized: str | None = None,
    n_positions: int = 4096,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> dict[str, Any]:
    """The config.json of a model, as the hub spells it.

    Args:
        family, numbers: `config.family` and `config.model`.
        dtype: of the weights, as torch names it.
        quantized: "fp32" or "ue8m0" for weights in FP8 with scales of that kind, None for none.
        n_positions: longest sequence that the model is meant for.
        bos_id, eos_ids, pad_id: marks of begin, end and padding; the last is written only where there is one.

    Raises:
        UserError: a family that nobody publishes like that.
    """
    kinds = [name for name, kind in KINDS.items() if kind.family == family]
    if not kinds:
        raise UserError(f"family {family!r}: no published config.json has its like. Known are v1, moe, v2 and v3.")
    if numbers.get("attention_bias") and numbers.get("qk_norm"):
        raise UserError("attention_bias beside qk_norm: no published config.json has both. Set one of them.")
    model_type = next((name for key, name in TOLD_BY.items() if numbers.get(key)), kinds[0])
    kind = KINDS[model_type]
    hf: dict[str, Any] = {"architectures": [kind.architecture], "model_type": model_type}
    hf |= {theirs: numbers[ours] for theirs, ours in kind.sizes.items()} | kind.fixed
    hf |= {"rms_norm_eps": numbers["norm_eps"], "initializer_range": numbers["init_std"]}
    hf |= {"rope_theta": numbers["rope_base"], "rope_scaling": _rope_scaling(numbers)}
    if "n_kv_heads" in numbers:
        hf |= {"num_key_value_heads": numbers["n_kv_heads"], "head_dim": numbers["head_width"]}
    else:
        hf |= {"num_key_value_heads": numbers["n_heads"], "q_lora_rank": numbers["q_rank"] or None}
    if "route_scale" in numbers:
        hf["routed_scaling_factor"] = numbers["route_scale"]
    if family == "v2":
        hf |= {"n_group": numbers["n_groups"], "topk_group": numbers["top_groups"]}
        hf["topk_method"] = GROUPED if numbers["n_groups"] > 1 else GREEDY
    if family == "v3":
        hf["num_nextn_predict_layers"] = numbers["mtp_depth"]
    if quantized:
        hf["quantization_config"] = FP8 | ({"scale_fmt": "ue8m0"} if quantized == "ue8m0" else {})
    hf |= {"max_position_embeddings": n_positions, "bos_token_id": bos_id}
    hf |= {"eos_token_id": one_or_list(eos_ids)} | ({} if pad_id is None else {"pad_token_id": pad_id})
    return hf | {"tie_word_embeddings": False, "torch_dtype": dtype, "use_cache": True}


def code(family: str) -> tuple[str, ...]:
    """Files of a release's own code without which transformers cannot open exports of a family; often none."""
    maps = [kind.auto_map for kind in KINDS.values() if kind.family == family]
    return tuple(sorted({f"{name.partition('.')[0]}.py" for auto_map in maps for name in auto_map.values()}))


def _rope_scaling(numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    if numbers.get("rope_llama3"):
        rope = dict(numbers["rope_llama3"])
        return {"rope_type": "llama3", "original_max_position_embeddings": rope.pop("original_length")} | rope
    if numbers.get("yarn"):
        yarn = Yarn(**numbers["yarn"])
        rope = {"type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.original_length}
        rope |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
        if "kv_rank" in numbers or yarn.mscale_all_dim:
            rope |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        if yarn.attention_factor is not None:
            rope["attention_factor"] = yarn.attention_factor
        return rope if yarn.truncate else rope | {"truncate": False}
    factor = numbers.get("rope_factor", 1.0)
    return {"type": "linear", "factor": factor} if factor != 1.0 else None
