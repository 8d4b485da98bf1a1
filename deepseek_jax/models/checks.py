"""What the families check of `config.model` before they build on it; each failure names the key and what would do."""

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.rope import Yarn


def check_keys(m: ConfigDict, sizes: tuple[str, ...], others: tuple[str, ...], counts: tuple[str, ...] = ()):
    """Raises UserError unless all keys are there; `sizes` are integers from 1 on, `counts` from 0 on."""
    if missing := [key for key in (*sizes, *counts, *others) if key not in m]:
        raise UserError(
            f"config.model lacks {', '.join(missing)}. Start from a config that holds a whole model, like tiny_v3."
        )
    for key, least in (*((size, 1) for size in sizes), *((count, 0) for count in counts)):
        if not isinstance(m[key], int) or isinstance(m[key], bool) or m[key] < least:
            raise UserError(f"config.model.{key}={m[key]!r}: expected an integer, {least} or more.")


def completed(m: ConfigDict, added: dict) -> ConfigDict:
    """`m` with the keys of `added` that a run from before they were known does not have, at what it computes."""
    return ConfigDict({**added, **m})


def check_group(m: ConfigDict, key: str, known: tuple[str, ...], n_needed: int) -> None:
    """Raises UserError unless `m[key]` is empty or holds the first `n_needed` of the `known` keys and no others."""
    if m[key] and not set(known[:n_needed]) <= set(m[key]) <= set(known):
        raise UserError(
            f"config.model.{key} has the keys {', '.join(m[key])}: wanted some of {', '.join(known)}, "
            f"the first {n_needed} always, or none at all."
        )


def read_yarn(m: ConfigDict) -> Yarn | None:
    """The context extension of `m.yarn`, None if that is empty."""
    check_group(m, "yarn", tuple(Yarn.__dataclass_fields__), n_needed=2)
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
