"""The families, one file each; `FAMILIES` is the only registry.

A family's module holds `Config` (a frozen dataclass with `from_config`), `KEYS` (those of `config.model`, each a field
of `Config` or of one of its parts) and `Model(c, run, *, rngs)`, an nnx.Module; the values below are module names,
imported when a run asks for them.
"""

import importlib
from types import ModuleType

from deepseek_jax.errors import UserError

FAMILIES = {
    "v1": "deepseek_jax.models.v1",
    "moe": "deepseek_jax.models.moe",
    "v2": "deepseek_jax.models.v2",
    "v3": "deepseek_jax.models.v3",
    "v32": "deepseek_jax.models.v32",
    "v4": "deepseek_jax.models.v4",
}


def family(name: str) -> ModuleType:
    """The module of the family called `name`. Raises UserError for an unknown one."""
    if name not in FAMILIES:
        raise UserError(f"config.family={name!r}: no such family. Choose one of: {', '.join(FAMILIES)}.")
    return importlib.import_module(FAMILIES[name])
