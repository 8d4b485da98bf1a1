"""Rotary base and context extension of config.json, in both spellings, and back.

The hub's files have rope_theta and rope_scaling side by side; transformers 5 puts both inside rope_parameters.

YaRN scales the rotary values by attention_factor; where that is not given, by the ratio of the temperatures
0.1 m ln(factor) + 1 of mscale and of mscale_all_dim.
  - Latent attention: mscale defaults to 1 and mscale_all_dim to 0, as in the released code, and the softmax scale
    grows by the square of the latter's temperature. Every released config gives both, and equal, so that the rotary
    values are not scaled at all.
  - Dense models: both are used if both are given, otherwise neither, as in transformers: the ratio is then
    0.1 ln(factor) + 1. R1-0528-Qwen3-8B gives attn_factor, by which vLLM multiplies the ratio (to 1). transformers does
    not read it; neither do we, and `remarks` says so.
"""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.bounds import MOST_POSITIONS
from deepseek_jax.convert.hf_config.fields import boolean, integer, invalid, number
from deepseek_jax.convert.safetensors.format import shown
from deepseek_jax.errors import UserError
from deepseek_jax.layers.rope import Yarn

KEYS: tuple[str, ...] = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "truncate")
KEYS += ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
KEYS += ("attention_factor", "attn_factor", "partial_rotary_factor")
OBJECTS = ("rope_parameters", "rope_scaling")  # the spelling of transformers 5, and the hub's


def read_rope(hf: Mapping[str, Any], known: tuple[str, ...]) -> tuple[float, dict]:
    """Returns (base, numbers of the context extension), from either spelling.

    The numbers are those of `Yarn`, those of `Llama3`, a factor, or none. `known`: context extensions that the family
    supports besides "default".
    """
    given = {key: hf[key] for key in OBJECTS if hf.get(key) is not None}
    if isinstance(both := given.get(OBJECTS[0]), dict) and both.keys() == {"main", "compress"}:
        return _read_two(hf, both, known)
    if wrong := [key for key, value in given.items() if not isinstance(value, dict)]:
        raise invalid(hf, wrong[0], "an object or null")
    objects = [(rope, f"{key}.") for key, rope in given.items()] or [({}, "")]
    found = [_read_object(hf, rope, where, known) for rope, where in objects]
    if found[0] != found[-1]:
        raise invalid(hf, "rope_scaling", "the same as in rope_parameters, or only one of the two")
    return found[0]


def _read_two(hf: Mapping[str, Any], both: dict, known: tuple[str, ...]) -> tuple[float, dict]:
    """Reads the base of V4's layers without a compressor, and the context extension of those with one."""
    found = []
    for name, rope in both.items():
        where = f"rope_parameters.{name}."
        if not isinstance(rope, dict):
            raise invalid(both, name, "an object", "rope_parameters.")
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
        found.append((name, _read_object(hf, rope, where, known)))
    main, compress = dict(found)["main"], dict(found)["compress"]
    if main[1]:
        expected = "'default': only layers with a compressor are extended"
        raise invalid(both["main"], "rope_type", expected, "rope_parameters.main.")
    if hf.get("compress_rope_theta") not in (None, compress[0]):
        raise invalid(hf, "compress_rope_theta", "the same as in rope_parameters.compress")
    return main[0], compress[1]


def _read_object(hf: Mapping[str, Any], rope: dict, where: str, known: tuple[str, ...]) -> tuple[float, dict]:
    """Reads one of the two objects, `rope` at `where`; the base may be beside it."""
    if unknown := [key for key in rope if key not in KEYS]:
        raise UserError(f"config.json: {where}{shown(unknown[0])} is unknown: expected keys of {', '.join(KEYS)}.")
    base = number(rope if "rope_theta" in rope else hf, "rope_theta", default=10_000.0, where=where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *known):
        key = "rope_type" if "rope_type" in rope else "type"
        raise invalid(rope, key, f"one of {', '.join(('default', *known))}", where)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise invalid(rope, "partial_rotary_factor", "1.0, or no such key", where)
    return base, READERS[kind](rope, where)


def _default(rope: dict, where: str) -> dict:
    """Checks that there is no context extension."""
    if rope.get("factor") not in (None, 1):
        raise invalid(rope, "rope_type", "the type of context extension that the factor beside it is for", where)
    return {}


def _linear(rope: dict, where: str) -> dict:
    """Reads the factor by which positions are divided."""
    return {"factor": number(rope, "factor", least=1.0, where=where)}


def _lengthened(rope: dict, where: str) -> dict:
    """Reads the factor and the context length before extension."""
    key = "original_max_position_embeddings"
    return _linear(rope, where) | {"original_length": integer(rope, key, most=MOST_POSITIONS, where=where)}


def _llama3(rope: dict, where: str) -> dict:
    """Reads the numbers of `Llama3`."""
    found = _lengthened(rope, where)
    found |= {key: number(rope, key, where=where) for key in ("low_freq_factor", "high_freq_factor")}
    if found["high_freq_factor"] <= found["low_freq_factor"]:
        raise invalid(rope, "high_freq_factor", "more than low_freq_factor", where)
    return found


def _yarn(rope: dict, where: str) -> dict:
    """Reads the numbers of `Yarn`; attention_factor and truncate only if they are given."""
    found = _lengthened(rope, where)
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    found |= {key: number(rope, key, default=value, least=0.0, where=where) for key, value in defaults.items()}
    if not found["beta_fast"] >= found["beta_slow"] > 0:
        raise invalid(rope, "beta_fast", "a number >= beta_slow, and beta_slow above 0", where)
    if rope.get("attention_factor") is not None:
        found["attention_factor"] = number(rope, "attention_factor", where=where)
    return found if boolean(rope, "truncate", True, where) else found | {"truncate": False}


READERS: dict[str, Callable[[dict, str], dict]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def remarks(hf: Mapping[str, Any]) -> list[str]:
    """Returns warnings about a config.json that `from_hf` reads."""
    ropes = [hf[key] for key in OBJECTS if isinstance(hf.get(key), dict)]
    factors = [rope["attn_factor"] for rope in ropes if rope.get("attn_factor") not in (None, 1)]
    if not factors:
        return []
    return [
        f"rope_scaling.attn_factor={shown(factors[0])} is not read, as in transformers; vLLM multiplies the rotary "
        f"values by it. To compute what vLLM computes, replace it by attention_factor = attn_factor * "
        f"(0.1 ln(factor) + 1)."
    ]


def write_rope(numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns rope_scaling as the hub spells it, None without a context extension."""
    if numbers.get("rope_llama3"):
        rope = dict(numbers["rope_llama3"])
        return {"rope_type": "llama3", "original_max_position_embeddings": rope.pop("original_length")} | rope
    if numbers.get("yarn"):
        return _write_yarn(Yarn(**numbers["yarn"]), is_latent="kv_rank" in numbers)
    factor = numbers.get("rope_factor", 1.0)
    return {"type": "linear", "factor": factor} if factor != 1.0 else None


def _write_yarn(yarn: Yarn, is_latent: bool) -> dict[str, Any]:
    rope = {"type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.original_length}
    rope |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
    if is_latent or yarn.mscale_all_dim:
        rope |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    if yarn.attention_factor is not None:
        rope["attention_factor"] = yarn.attention_factor
    return rope if yarn.truncate else rope | {"truncate": False}
