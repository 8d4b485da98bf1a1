"""The chosen experts of one token in one pass over their weights.

experts     y = sum_k g_k down_k^T (silu(gate_k^T x) * (up_k^T x))

api.py          the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper, Pallas Mosaic GPU
"""

from pallas_kernels.token_experts.api import experts

__all__ = ["experts"]
