"""Decode with latent attention over a paged cache: the absorbed form, in which all heads read the latents themselves.

decode          the public function: checks its arguments, calls the implementation that is named
Pages           a cache in the dtype of the queries; `contiguous` takes one that is not paged as pages
Fp8Pages        a cache in FP8, with scales
reference.py    the definition, in plain jax.numpy
chunked.py      some pages at a time, in plain jax: any device
hopper.py       Hopper: Pallas Mosaic GPU; gpu.py, gpu_load.py and gpu_plan.py are its kernel
tpu.py          TPUs: Pallas Mosaic TPU
work.py         which pages are read together, and how parts of a sequence are put together
fp8_cache.py    entries of the FP8 cache, and back
"""

from pallas_kernels.mla_decode.api import Fp8Pages, Pages, contiguous, decode

__all__ = ["Fp8Pages", "Pages", "contiguous", "decode"]
