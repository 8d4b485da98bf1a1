"""What the families check of `config.model` before they build on it; each failure names the key and what would do."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict

from deepseek_jax.bounds import (
    LARGEST,
    MOST_LAYERS,
    MOST_POSITIONS,
    Bound,
    number,
    optional,
    several,
    shown,
    switch,
    whole,
)
from deepseek_jax.errors import UserError

POSITIVE = number(0, 1e15, above=True)
SIZE, COUNT = whole(1, LARGEST), whole(0, LARGEST)
BOUNDS: dict[str, Bound] = {  # of keys that are no plain size
    "n_layers": whole(1, MOST_LAYERS),
    "n_dense_layers": COUNT,
    "n_shared_experts": COUNT,
    "q_rank": COUNT,
    "mtp_depth": whole(0, 16),
    "norm_eps": number(0, 1, above=True),
    "init_std": number(0, 1000),
    "rope_base": POSITIVE,
    "rope_factor": POSITIVE,
    "route_scale": POSITIVE,
    "attention_bias": switch(),
    "qk_norm": switch(),
    "index_dense": switch(),
    "compress_ratios": several(whole(0, MOST_POSITIONS)),
    "n_hash_layers": COUNT,
    "compress_rope_base": POSITIVE,
    "hyper_eps": number(0, 1),
    "swiglu_limit": number(0, 1e15),
}
GROUPS: dict[str, dict[str, Bound]] = {  # the keys of a group, those that it always has first
    "yarn": {
        "factor": POSITIVE,
        "original_length": whole(1, MOST_POSITIONS),
        "beta_fast": POSITIVE,
        "beta_slow": POSITIVE,
        "mscale": number(0, 1e15),
        "mscale_all_dim": number(0, 1e15),
        "attention_factor": optional(POSITIVE),
        "truncate": switch(),
    },
    "rope_llama3": {
        "factor": POSITIVE,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        "original_length": whole(1, MOST_POSITIONS),
    },
}


def check_keys(m: ConfigDict, keys: tuple[str, ...]) -> None:
    """Raises UserError unless all `keys` are there and within `BOUNDS`; keys without a bound are sizes >= 1."""
    if missing := [key for key in keys if key not in m]:
        raise UserError(
            f"config.model needs {', '.join(missing)}. Start from a config that holds a whole model, like tiny_v3."
        )
    for key in keys:
        if key not in GROUPS:
            BOUNDS.get(key, SIZE).check(f"config.model.{key}", m[key])


def keys(cls: type) -> tuple[str, ...]:
    """The keys of a config that `take` reads into the dataclass `cls`: its fields, and those of its parts."""
    kinds: dict[str, Any] = get_type_hints(cls)
    parts = [keys(kind) if isinstance(kind, type) and is_dataclass(kind) else (name,) for name, kind in kinds.items()]
    return tuple(dict.fromkeys(key for part in parts for key in part))


def take(cls: type, m: Mapping) -> Any:
    """The dataclass `cls` of a config's keys: every field by the key of its name.

    A field that is a dataclass is taken from the same keys; one that is a dataclass or None from the group of its name,
    which may be empty. Fields without a key keep their defaults.
    """
    kinds, found = get_type_hints(cls), {}
    for name in (field.name for field in fields(cls)):
        optional_group: list[Any] = [kind for kind in get_args(kinds[name]) if is_dataclass(kind)]
        if is_dataclass(kinds[name]):
            found[name] = take(kinds[name], m)
        elif optional_group and name in m:
            found[name] = read_group(optional_group[0], m, name)
        elif name in m:
            found[name] = m[name]
    return cls(**found)


def read_group(cls: type, m: Mapping, key: str) -> Any:
    """`cls(**m[key])`, None if that is empty. Raises UserError for a missing, unknown or wrong key of it."""
    known, group = list(GROUPS[key]), m[key]
    n_needed = sum(field.default is MISSING for field in fields(cls))
    if not isinstance(group, (ConfigDict, dict)):
        raise UserError(f"config.model.{key}={shown(group)}: expected a ConfigDict, empty or of {', '.join(known)}.")
    if group and not set(known[:n_needed]) <= set(group) <= set(known):
        raise UserError(
            f"config.model.{key} has the keys {', '.join(map(str, group))}: expected some of {', '.join(known)}, "
            f"the first {n_needed} always, or none at all."
        )
    for name, value in group.items():
        GROUPS[key][name].check(f"config.model.{key}.{name}", value)
    return cls(**group) if group else None


def check_heads(m: ConfigDict) -> None:
    """Raises UserError unless the key-value heads divide the heads and rotary halves the head."""
    if m.n_heads % m.n_kv_heads:
        raise UserError(f"config.model: n_kv_heads={m.n_kv_heads} does not divide n_heads={m.n_heads}.")
    check_even(m, "head_width")


def check_even(m: ConfigDict, key: str) -> None:
    """Raises UserError for an odd rotary width."""
    if m[key] % 2:
        raise UserError(f"config.model.{key}={m[key]}: rotary pairs need an even width.")


def check_groups(m: ConfigDict) -> None:
    """Raises UserError unless groups divide the experts and hold enough of them."""
    if m.n_experts % m.n_groups or m.top_groups > m.n_groups:
        raise UserError(
            f"config.model: {m.n_experts} experts in n_groups={m.n_groups}, top_groups={m.top_groups}. "
            "Choose groups that divide the experts, and top_groups from 1 to n_groups."
        )
    if m.top_k > m.n_experts // m.n_groups * m.top_groups:
        raise UserError(
            f"config.model.top_k={m.top_k}: {m.top_groups} groups hold {m.n_experts // m.n_groups * m.top_groups} "
            "experts. Choose a smaller top_k or more top_groups."
        )
