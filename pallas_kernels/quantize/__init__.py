"""Quantisation of activations to E4M3, along both axes at once.

quantize        the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper: one pass over the matrix, Pallas Mosaic GPU
"""

from pallas_kernels.quantize.api import Quantized, quantize

__all__ = ["Quantized", "quantize"]
