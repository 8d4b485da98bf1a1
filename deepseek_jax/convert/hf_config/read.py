"""config.json as a family and its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.bounds import LARGEST, MOST_LAYERS, MOST_POSITIONS
from deepseek_jax.convert import formats
from deepseek_jax.convert.hf_config.fields import boolean, integer, invalid, is_integer, number
from deepseek_jax.convert.hf_config.kinds import COUNTS, KINDS, Kind
from deepseek_jax.convert.hf_config.rope import read_rope
from deepseek_jax.convert.safetensors.format import shown
from deepseek_jax.errors import UserError

MOST_END_TOKENS = 100
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


class ConfigFacts(NamedTuple):
    """What a config.json says besides the numbers of the model."""

    n_positions: int  # longest sequence that the release is meant for
    bos_id: int | None  # begin-of-sequence token; None if it is not given
    eos_ids: tuple[int, ...]  # end-of-sequence tokens; empty if none is given
    is_tied: bool  # whether the head is the transposed embedding and not stored
    pad_id: int | None = None  # padding token; None if it is not given


def from_hf(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the family of a config.json and its numbers: all keys of `config.model`, groups of them as plain dicts.

    Raises UserError, naming the key, if one is missing, of a wrong type, out of range, or has an unknown value.
    """
    kind = _kind(hf)
    for key, value in (kind.fixed | kind.refused).items():
        if hf.get(key) is not None and (hf[key] != value or isinstance(hf[key], bool) != isinstance(value, bool)):
            raise invalid(hf, key, f"{value!r}, the only value supported for model_type {hf['model_type']!r}")
    numbers: dict[str, Any] = {ours: _size(hf, theirs) for theirs, ours in kind.sizes.items()}
    if numbers["n_layers"] > MOST_LAYERS:
        raise invalid(hf, "num_hidden_layers", f"at most {MOST_LAYERS}")
    numbers["norm_eps"] = number(hf, "rms_norm_eps", default=1e-6)
    numbers["init_std"] = number(hf, "initializer_range", default=0.02)
    _check_quantization(hf)
    numbers["rope_base"], rope = read_rope(hf, kind.rope_types)
    numbers |= kind.implied | kind.read_extra(hf, numbers, rope)
    facts(hf)
    return kind.family, numbers


def facts(hf: Mapping[str, Any]) -> ConfigFacts:
    """Returns what a config.json says besides the numbers. Raises UserError naming the key."""
    n_positions = integer(hf, "max_position_embeddings", default=4096, most=MOST_POSITIONS)
    pad = hf.get("pad_token_id")
    pad = pad if is_integer(pad, 0, LARGEST) else None  # some releases have -1, which means none
    tied = boolean(hf, "tie_word_embeddings", False)
    bos = hf.get("bos_token_id")
    if bos is not None and not is_integer(bos, 0, LARGEST):
        raise invalid(hf, "bos_token_id", "a token id or null")
    return ConfigFacts(n_positions, bos, eos_ids(hf), tied, pad)


def eos_ids(hf: Mapping[str, Any], where: str = "config.json") -> tuple[int, ...]:
    """Returns the end-of-sequence tokens in a config.json or generation_config.json, in order. Raises UserError."""
    eos = hf.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    if len(ids) > MOST_END_TOKENS or not all(is_integer(value, 0, LARGEST) for value in ids if value is not None):
        raise UserError(f"{where}: eos_token_id={shown(eos)}: expected a token id, a short list of them, or null.")
    return tuple(value for value in ids if value is not None)


def one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    """Returns ids as these files spell them: a single one as a number, several as a list, none as null."""
    return ids[0] if len(ids) == 1 else list(ids) or None


def _kind(hf: Mapping[str, Any]) -> Kind:
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"config.json: model_type={shown(kind)} is not supported: expected one of {', '.join(KINDS)}.")
    return KINDS[kind]


def _size(hf: Mapping[str, Any], key: str) -> int:
    """Returns a size, or a count that may be 0; a null n_shared_experts means 0, as in the released code."""
    if key == "n_shared_experts" and key in hf and hf[key] is None:
        return 0
    return integer(hf, key, least=0 if key in COUNTS else 1)


def _check_quantization(hf: Mapping[str, Any]) -> None:
    """Raises UserError for anything but DeepSeek's FP8 in blocks of 128 x 128."""
    formats.check_bits(hf)
    found = hf.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, dict):
        raise invalid(hf, "quantization_config", "an object or null")
    for key, value in FP8.items():
        needed = key in found or key in ("quant_method", "weight_block_size")
        if key != "activation_scheme" and needed and found.get(key) != value:
            raise invalid(found, key, f"{value!r}, as in DeepSeek's FP8", "quantization_config.")
    if found.get("scale_fmt") not in (None, "ue8m0", "float"):
        raise invalid(found, "scale_fmt", "'ue8m0', or no such key", "quantization_config.")
