"""Which function computes what: operations that have more than one implementation, by name.

`TABLE` is the only registry. Its values are "module:function", imported when a model asks for them. All functions of
an operation take the arguments of the first one, which defines it. An unknown name is an error: nothing falls back.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deepseek_jax.errors import UserError

TABLE = {
    "attention": {
        "xla": "deepseek_jax.layers.attention:causal_attention",
        "chunked": "deepseek_jax.layers.attention:chunked",  # any device; memory grows with T, not with its square
        "reference": "deepseek_jax.layers.attention:reference",  # any device; stores all scores
        "mosaic_gpu": "deepseek_jax.layers.attention:on_hopper",  # Hopper, bf16, widths that are multiples of 64
        "mosaic_tpu": "deepseek_jax.layers.attention:on_tpu",  # TPUs, bf16 or fp32, widths as for Hopper
        "cudnn": "deepseek_jax.layers.cudnn_attention:causal_attention",  # NVIDIA GPUs, bf16, documents not masked
    },
    "latent_decode": {
        "xla": "deepseek_jax.layers.attention:latent_decode",
        "chunked": "deepseek_jax.layers.attention:latent_decode_chunked",  # any device; some slots at a time
        "by_size": "deepseek_jax.layers.attention:latent_decode_by_size",  # Hopper as below: few slots by XLA,
        # but pages of 16 heads by the kernel
        "mosaic_gpu": "deepseek_jax.layers.attention:latent_decode_on_hopper",  # Hopper, bf16, latents 256 or 512 wide
        "mosaic_tpu": "deepseek_jax.layers.attention:latent_decode_on_tpu",  # TPUs, bf16 or fp32, latents up to 512
    },
    "indexed_attention": {
        "xla": "deepseek_jax.layers.indexed_attention:indexed_attention",
        "mosaic_gpu": "deepseek_jax.layers.indexed_kernels:attention_on_hopper",  # Hopper, bf16, multiples of 64
    },
    "indexed_learning": {  # what the indexer learns by
        "xla": "deepseek_jax.layers.indexed_attention:learning",
        "mosaic_gpu": "deepseek_jax.layers.indexed_kernels:learning_on_hopper",  # likewise, widths up to 192
    },
    "indexed_choice": {  # of slots of a cache; the engine leaves this and the next to XLA
        "xla": "deepseek_jax.layers.indexer:choice",
        "triton": "deepseek_jax.layers.indexed_kernels:choice_by_triton",  # NVIDIA GPUs; scores by XLA
        "mosaic_gpu": "deepseek_jax.layers.indexed_kernels:choice_on_hopper",  # Hopper, FP8 caches alone
    },
    "indexed_decode": {
        "xla": "deepseek_jax.layers.indexed_attention:indexed_decode",
        "mosaic_gpu": "deepseek_jax.layers.indexed_kernels:decode_on_hopper",  # Hopper, bf16, latents 256 or 512 wide
    },
    "sinkhorn": {  # of the streams of hyper-connections
        "xla": "deepseek_jax.layers.hyper:sinkhorn",
        "triton": "deepseek_jax.layers.hyper:sinkhorn_by_triton",  # NVIDIA GPUs
    },
    "grouped_decode": {"xla": "deepseek_jax.layers.attention:grouped_decode"},
    "grouped_matmul": {
        "xla": "deepseek_jax.precision.grouped:grouped_matmul",
        "mosaic_gpu": "deepseek_jax.precision.grouped:on_hopper",  # Hopper, bf16, widths that are multiples of 128
        "mosaic_tpu": "deepseek_jax.precision.grouped:on_tpu",  # the same on TPUs
    },
    "token_experts": {  # of a step of one token, whose weights lie in the stack of all layers
        "xla": "deepseek_jax.layers.grouped:by_three_products",  # each by `grouped_matmul`
        "mosaic_gpu": "deepseek_jax.layers.grouped:in_one_pass_on_hopper",  # Hopper, bf16, multiples of 256 and 64
    },
    "coded_token_experts": {  # the same with weights that stay in FP8
        "xla": "deepseek_jax.layers.grouped:by_three_products",  # each by `coded_matmul`
        "mosaic_gpu": "deepseek_jax.layers.grouped:of_codes_on_hopper",  # Hopper, bf16, multiples of 256 and 64
    },
    "coded_experts": {  # of rows sorted by expert, with weights that stay in FP8
        "xla": "deepseek_jax.layers.grouped:by_three_grouped_products",  # each by `coded_matmul`
        "mosaic_gpu": "deepseek_jax.layers.grouped:by_two_passes_on_hopper",  # Hopper, bf16, multiples of 128
    },
    "coded_matmul": {  # with weights that stay in FP8
        "xla": "deepseek_jax.precision.fp8_weight_kernels:by_xla",
        "mosaic_gpu": "deepseek_jax.precision.fp8_weight_kernels:on_hopper",  # Hopper, bf16, multiples of 64
    },
    "quantize": {  # of activations in blocks, along both axes; this and the next five: precision fp8, Hopper as above
        "xla": "deepseek_jax.precision.fp8_kernels:quantize",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:quantize_on_hopper",
        "mosaic_tpu": "deepseek_jax.precision.fp8_kernels:quantize_on_tpu",
    },
    "quantize_swiglu": {
        "xla": "deepseek_jax.precision.fp8_kernels:quantize_swiglu",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:quantize_swiglu_on_hopper",
        "mosaic_tpu": "deepseek_jax.precision.fp8_kernels:quantize_swiglu_on_tpu",
    },
    "quantize_squares": {  # of weights, as stored and transposed
        "xla": "deepseek_jax.precision.fp8_kernels:quantize_squares",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:quantize_squares_on_hopper",
        "mosaic_tpu": "deepseek_jax.precision.fp8_kernels:quantize_squares_on_tpu",
    },
    "fp8_matmul": {
        "xla": "deepseek_jax.precision.fp8_kernels:fp8_matmul",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:fp8_matmul_on_hopper",
        "mosaic_tpu": "deepseek_jax.precision.fp8_kernels:fp8_matmul_on_tpu",
    },
    "grouped_fp8_matmul": {
        "xla": "deepseek_jax.precision.fp8_kernels:grouped_fp8_matmul",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:grouped_fp8_matmul_on_hopper",
        "mosaic_tpu": "deepseek_jax.precision.fp8_kernels:grouped_fp8_matmul_on_tpu",
    },
    "grouped_fp8_weight_gradient": {
        "xla": "deepseek_jax.precision.fp8_kernels:grouped_fp8_weight_gradient",
        "mosaic_gpu": "deepseek_jax.precision.fp8_kernels:grouped_fp8_weight_gradient_on_hopper",
        "mosaic_tpu": "deepseek_jax.precision.fp8_kernels:grouped_fp8_weight_gradient_on_tpu",
    },
    "cross_entropy": {"xla": "deepseek_jax.train.cross_entropy:cross_entropy"},
}


@dataclass(frozen=True)
class Kernels:
    """The implementation of each operation: `Kernels(grouped_matmul="mosaic_gpu")["grouped_matmul"]` is a function.

    Operations that are not named are computed by XLA. Raises UserError for an unknown operation or implementation.
    """

    chosen: Mapping[str, str]

    def __init__(self, **chosen: str):
        for operation, name in chosen.items():
            if operation not in TABLE:
                raise UserError(f"kernels.{operation}: no such operation. Choose one of {', '.join(TABLE)}.")
            if name not in TABLE[operation]:
                raise UserError(f"kernels.{operation}={name!r}: unknown. Choose one of {', '.join(TABLE[operation])}.")
        object.__setattr__(self, "chosen", dict.fromkeys(TABLE, "xla") | chosen)

    def __hash__(self) -> int:
        return hash(tuple(self.chosen.items()))

    def __getitem__(self, operation: str) -> Callable:
        module, _, function = TABLE[operation][self.chosen[operation]].partition(":")
        return getattr(importlib.import_module(module), function)


XLA = Kernels()  # everything by XLA, on any device
