"""Products of bfloat16 activations with weights kept as FP8 codes and the scales of their blocks.

coded_matmul    one product; checks its arguments, calls the implementation that is named
coded_experts   the three products of a SwiGLU per group, its gate and up in one pass
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper: Pallas Mosaic GPU
tiles.py        which tiles the kernel uses
"""

from pallas_kernels.coded_matmul.api import coded_experts, coded_matmul

__all__ = ["coded_experts", "coded_matmul"]
