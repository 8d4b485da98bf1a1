"""Block-scaled FP8 matmul.

fp8_matmul      the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper: Pallas Mosaic GPU
tpu.py          TPUs: Pallas Mosaic TPU
tiles.py        which tiles the GPU kernel uses for which shape, measured
"""

from pallas_kernels.fp8_matmul.api import fp8_matmul

__all__ = ["fp8_matmul"]
