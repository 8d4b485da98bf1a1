"""Quantisation of activations to E4M3, along both axes at once; also of a SwiGLU's output, which is then never stored.

quantize, quantize_swiglu   the public functions: check their arguments, call the implementation that is named

api.py          where they are
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper: one pass over the matrix, Pallas Mosaic GPU
tpu.py          TPUs: the same, Pallas Mosaic TPU
whole_blocks.py matrices filled up to whole blocks, for both
"""

from pallas_kernels.quantize.api import Quantized, quantize, quantize_swiglu

__all__ = ["Quantized", "quantize", "quantize_swiglu"]
