"""DeepSeek sparse attention: of each query to rows of its own.

attend          absorbed, rows gathered out of a cache, for prefill and decode
attend_expanded keys and values of each head, keys chosen by bits, for training: with gradients
mean_weights    of that attention, mean over the heads: what an indexer learns by

api.py          `attend`: checks its arguments, calls the implementation that is named
expanded.py     `attend_expanded`, on Hopper by the kernels of `mla_attention`
mean.py         `mean_weights`, on Hopper by `gpu_mean.py`
reference.py    the definition, in plain jax.numpy
hopper.py       Hopper: Pallas Mosaic GPU; gpu.py gathers, the rest is the kernel of `mla_decode`
"""

from pallas_kernels.sparse_mla.api import attend
from pallas_kernels.sparse_mla.expanded import attend_expanded
from pallas_kernels.sparse_mla.mean import mean_weights

__all__ = ["attend", "attend_expanded", "mean_weights"]
