"""Which function computes what: operations that have more than one implementation, by name.

`TABLE` is the only registry. Its values are "module:function", imported when a model asks for them. All functions of
an operation take the arguments of the first one, which defines it. An unknown name is an error: nothing falls back.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_jax.errors import UserError

TABLE = {
    "attention": {"xla": "deepseek_jax.layers.attention:causal_attention"},
    "latent_decode": {"xla": "deepseek_jax.layers.attention:latent_decode"},
    "grouped_decode": {"xla": "deepseek_jax.layers.attention:grouped_decode"},
    "grouped_matmul": {
        "xla": "deepseek_jax.precision.grouped:grouped_matmul",
        "mosaic_gpu": "deepseek_jax.precision.grouped:on_hopper",
    },
    "quantize": {
        "xla": "deepseek_jax.precision.fp8_kernels:quantize",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:quantize_on_hopper",
    },
    "fp8_matmul": {
        "xla": "deepseek_jax.precision.fp8_kernels:fp8_matmul",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:fp8_matmul_on_hopper",
    },
    "grouped_fp8_matmul": {
        "xla": "deepseek_jax.precision.fp8_kernels:grouped_fp8_matmul",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:grouped_fp8_matmul_on_hopper",
    },
    "grouped_fp8_weight_gradient": {
        "xla": "deepseek_jax.precision.fp8_kernels:grouped_fp8_weight_gradient",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:grouped_fp8_weight_gradient_on_hopper",
    },
}


@dataclass(frozen=True)
class Kernels:
    """The name of the implementation of each operation; `kernels[operation]` is the function itself.

    Raises:
        UserError: an unknown name.
    """

    attention: str = "xla"  # of tokens that look at themselves
    latent_decode: str = "xla"  # of new tokens over a cache of latents
    grouped_decode: str = "xla"  # of new tokens over a cache of keys and values
    grouped_matmul: str = "xla"  # of rows with the weights of their experts
    quantize: str = "xla"  # of activations in blocks, along both axes (precision fp8)
    fp8_matmul: str = "xla"  # of such codes
    grouped_fp8_matmul: str = "xla"  # of rows of codes with those of their experts' weights
    grouped_fp8_weight_gradient: str = "xla"  # of experts' weights, from codes

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, known = getattr(self, field.name), TABLE[field.name]
            if name not in known:
                raise UserError(f"kernels.{field.name}={name!r}: unknown. Choose one of {', '.join(known)}.")

    def __getitem__(self, operation: str) -> Callable:
        module, _, function = TABLE[operation][getattr(self, operation)].partition(":")
        return getattr(importlib.import_module(module), function)


XLA = Kernels()  # everything by XLA, on any device
