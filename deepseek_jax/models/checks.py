"""What the families check of `config.model` before they build on it; each failure names the key and what would do."""

from types import ModuleType

from ml_collections import ConfigDict

from deepseek_jax.bounds import LARGEST, MOST_LAYERS, MOST_POSITIONS, Bound, number, optional, shown, switch, whole
from deepseek_jax.errors import UserError
from deepseek_jax.layers.rope import Llama3, Yarn

POSITIVE = number(0, 1e15, above=True)
BOUNDS: dict[str, Bound] = {  # of keys that are no plain size or count
    "n_layers": whole(1, MOST_LAYERS),
    "mtp_depth": whole(0, 16),
    "norm_eps": number(0, 1, above=True),
    "init_std": number(0, 1000),
    "rope_base": POSITIVE,
    "rope_factor": POSITIVE,
    "route_scale": POSITIVE,
    "attention_bias": switch(),
    "qk_norm": switch(),
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


def check_keys(m: ConfigDict, sizes: tuple[str, ...], others: tuple[str, ...], counts: tuple[str, ...] = ()):
    """Raises UserError unless all keys are there, within `BOUNDS`; other `sizes` are 1 or more, `counts` 0 or more."""
    if missing := [key for key in (*sizes, *counts, *others) if key not in m]:
        raise UserError(
            f"config.model lacks {', '.join(missing)}. Start from a config that holds a whole model, like tiny_v3."
        )
    bounds = dict.fromkeys(sizes, whole(1, LARGEST)) | dict.fromkeys(counts, whole(0, LARGEST)) | BOUNDS
    for key in (*sizes, *counts, *others):
        if key not in GROUPS:
            bounds[key].check(f"config.model.{key}", m[key])


def keys_of(family: ModuleType) -> tuple[str, ...]:
    """The keys of `config.model` that a family has."""
    return (*family.SIZES, *getattr(family, "COUNTS", ()), *family.OTHERS)


def completed(m: ConfigDict, added: dict) -> ConfigDict:
    """`m` with the keys of `added` that a run from before they were known does not have, at what it computes."""
    return ConfigDict({**added, **m})


def check_group(m: ConfigDict, key: str, n_needed: int) -> None:
    """Raises UserError unless `m[key]` is empty or holds the first `n_needed` of its keys in `GROUPS` and no others."""
    known, group = list(GROUPS[key]), m[key]
    if not isinstance(group, (ConfigDict, dict)):
        raise UserError(f"config.model.{key}={shown(group)}: expected a ConfigDict, empty or of {', '.join(known)}.")
    if group and not set(known[:n_needed]) <= set(group) <= set(known):
        raise UserError(
            f"config.model.{key} has the keys {', '.join(map(str, group))}: expected some of {', '.join(known)}, "
            f"the first {n_needed} always, or none at all."
        )
    for name, value in group.items():
        GROUPS[key][name].check(f"config.model.{key}.{name}", value)


def read_llama3(m: ConfigDict) -> Llama3 | None:
    """The context extension of `m.rope_llama3`, None if that is empty."""
    check_group(m, "rope_llama3", n_needed=4)
    return Llama3(**m.rope_llama3) if m.rope_llama3 else None


def read_yarn(m: ConfigDict) -> Yarn | None:
    """The context extension of `m.yarn`, None if that is empty."""
    check_group(m, "yarn", n_needed=2)
    return Yarn(**m.yarn) if m.yarn else None


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
