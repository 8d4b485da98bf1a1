"""Quantisation of activations to E4M3, along both axes at once.

quantize        the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, in plain jax.numpy
gpu.py          NVIDIA GPUs: one pass over the matrix
"""

from pallas_kernels.quantize.api import Quantized, quantize

__all__ = ["Quantized", "quantize"]
