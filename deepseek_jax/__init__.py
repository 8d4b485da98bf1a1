"""DeepSeek in JAX and Flax, from the papers.

`build(config)` and `load(directory)` return a language model; `save_pretrained(model, directory)` writes one in
the published format. The packages:

    models      one file per family (V1, MoE, V2, V3), in the report's order
    layers      norm, rotary positions, latent attention, router, experts, multi-token prediction
    parallel    the mesh, which logical axis lives where, the exchange of tokens between experts
    precision   number formats and the matmuls that use them
    data        corpus, tokenizer, packing; the step number is the only state
    train       loss, optimizer, step, loop, checkpoints, metrics
    serve       prefill, decode, sampling
    convert     published weights in and out
    plan        what a run costs, from shapes
    configs     one `get_config()` per run (the top-level folder `configs/`)
    launch      one file per verb of `deepseek-jax VERB` (the top-level folder `launch/`)
    shapes      the legend of the letters in which array names end

Importing this package imports no jax.
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
