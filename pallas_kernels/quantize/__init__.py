"""Quantisation to E4M3 of activations along both axes at once, also of a SwiGLU's output, and of weights in squares.

quantize, quantize_swiglu, quantize_squares   the public functions: check their arguments, call what is named

api.py          where they are
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper: one pass over the matrix, Pallas Mosaic GPU
tpu.py          TPUs: the same, Pallas Mosaic TPU
whole_blocks.py matrices filled up to whole blocks, for both
"""

from pallas_kernels.quantize.api import Quantized, Squares, quantize, quantize_squares, quantize_swiglu

__all__ = ["Quantized", "Squares", "quantize", "quantize_squares", "quantize_swiglu"]
