"""DeepSeek in JAX and Flax, from the papers.

`build(config)` and `load(directory)` return a language model; `save_pretrained(model, directory)` writes one in
the published format. ARCHITECTURE.md says what each package is for. Importing this one imports no jax.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "load", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Fetches the others of `__all__` when first asked for."""
    if name in ("build", "load", "save_pretrained"):
        return getattr(importlib.import_module("deepseek_jax.language_model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
