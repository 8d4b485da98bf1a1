"""Exact top k of long rows, in order of position: the tokens that DeepSeek sparse attention looks at.

top_k           the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, by `jax.lax.top_k`
threshold.py    a threshold found by counting, in plain jax: any device
gpu.py          the same in one pass over memory for NVIDIA GPUs: Pallas Triton
gpu_split.py    a few long rows, whose parts are counted side by side
"""

from pallas_kernels.topk.api import top_k

__all__ = ["top_k"]
