"""Logits of a lightning indexer over E4M3 codes: which tokens a query of DeepSeek sparse attention looks at.

logits          the public function: checks its arguments, calls the implementation that is named
encode, Codes   rows in E4M3 with a scale each, a power of two
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper: Pallas Mosaic GPU
"""

from pallas_kernels.indexer.api import Codes, encode, logits

__all__ = ["Codes", "encode", "logits"]
