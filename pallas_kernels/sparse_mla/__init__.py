"""Latent attention of each query to rows of its own, gathered out of a cache: DeepSeek sparse attention, absorbed.

attend          the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, in plain jax.numpy
hopper.py       Hopper: Pallas Mosaic GPU; gpu.py gathers, the rest is the kernel of `mla_decode`
"""

from pallas_kernels.sparse_mla.api import attend

__all__ = ["attend"]
