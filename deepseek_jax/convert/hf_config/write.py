"""A family and its numbers as a config.json, in the hub's spelling, which both old and new software reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.convert.hf_config.kinds import KINDS
from deepseek_jax.convert.hf_config.read import FP8, one_or_list
from deepseek_jax.convert.hf_config.rope import write_rope
from deepseek_jax.errors import UserError


def to_hf(
    family: str,
    numbers: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    quantized: str | None = None,
    experts: str | None = None,
    n_positions: int = 4096,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> dict[str, Any]:
    """Returns the config.json of a model, as the hub spells it. Raises UserError if no model_type has these numbers.

    Args:
        family, numbers: `config.family` and `config.model`.
        dtype: dtype of the weights, as torch names it.
        quantized: "fp32" or "ue8m0" for weights in FP8 with scales of that kind; None for other weights.
        experts: "fp4" or "fp8", the format of routed experts where releases name it (V4's); None where they do not.
        n_positions: longest sequence that the model is meant for.
        bos_id, eos_ids, pad_id: tokens of begin, end and padding; the last is written only if there is one.
    """
    name = model_type(family, numbers)
    kind = KINDS[name]
    hf: dict[str, Any] = {"architectures": [kind.architecture], "model_type": name}
    hf |= {theirs: numbers[ours] for theirs, ours in kind.sizes.items()} | kind.fixed
    hf |= {"rms_norm_eps": numbers["norm_eps"], "initializer_range": numbers["init_std"]}
    hf |= {"rope_theta": numbers["rope_base"], "rope_scaling": write_rope(numbers)} | kind.write_extra(numbers)
    if quantized:
        hf["quantization_config"] = FP8 | ({"scale_fmt": "ue8m0"} if quantized == "ue8m0" else {})
    if experts:
        hf["expert_dtype"] = experts
    hf |= {"max_position_embeddings": n_positions, "bos_token_id": bos_id}
    hf |= {"eos_token_id": one_or_list(eos_ids)} | ({} if pad_id is None else {"pad_token_id": pad_id})
    return hf | {"tie_word_embeddings": False, "torch_dtype": dtype, "use_cache": True}


def model_type(family: str, numbers: Mapping[str, Any]) -> str:
    """Returns the first model_type of the family that implies these numbers. Raises UserError."""
    kinds = {name: kind for name, kind in KINDS.items() if kind.family == family}
    if not kinds:
        known = ", ".join(sorted({kind.family for kind in KINDS.values()}))
        raise UserError(f"family {family!r} has no published config.json: expected one of {known}.")
    for name, kind in kinds.items():
        if all(bool(numbers.get(key)) == value for key, value in kind.implied.items()):
            return name
    given = [key for key in next(iter(kinds.values())).implied if numbers.get(key)]
    raise UserError(f"{' and '.join(given)} are both set: no published config.json has both. Set one of them.")


def code(family: str) -> tuple[str, ...]:
    """Returns the files of a release's own code without which transformers cannot open an export; often none."""
    maps = [kind.auto_map for kind in KINDS.values() if kind.family == family]
    return tuple(sorted({f"{name.partition('.')[0]}.py" for auto_map in maps for name in auto_map.values()}))
