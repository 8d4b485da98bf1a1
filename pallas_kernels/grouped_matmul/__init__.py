"""Grouped matmul: many matmuls at once, each with as many rows as its group has at run time.

grouped_matmul, grouped_weight_gradient             bfloat16; the first is differentiable
grouped_fp8_matmul, grouped_fp8_weight_gradient     E4M3 codes with block scales
Groups, Scaled                                      what they take: rows per group; codes and scales

api.py          the public functions: check their arguments, call the implementation that is named
reference.py    the definition, in plain jax.numpy
layout.py       which rows belong to which group, and the list of row tiles that covers them
pipeline.py     Hopper, Pallas Mosaic GPU: the ring of stages and the sums that both kernels share
rows.py         the kernel whose result has the rows of x
weights.py      the kernel whose result has one matrix per group
tpu.py          both kernels for TPUs, Pallas Mosaic TPU
tiles.py        which tiles the kernels use
"""

from pallas_kernels.grouped_matmul.api import (
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    grouped_matmul,
    grouped_weight_gradient,
)
from pallas_kernels.grouped_matmul.layout import Groups, Scaled

__all__ = [
    "Groups",
    "Scaled",
    "grouped_fp8_matmul",
    "grouped_fp8_weight_gradient",
    "grouped_matmul",
    "grouped_weight_gradient",
]
