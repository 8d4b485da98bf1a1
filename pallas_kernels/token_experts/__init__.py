"""The chosen experts of one token, or of a few, in one pass over their weights.

experts             y = sum_k g_k down_k^T (silu(gate_k^T x) * (up_k^T x))
experts_in_codes    the same with weights that stay FP8 codes, outputs first

api.py          the public functions: check their arguments, call the implementation that is named
reference.py    the definition, in plain jax.numpy
gpu.py          Hopper, Pallas Mosaic GPU: bfloat16 weights
gpu_codes.py    the same: FP8 codes
"""

from pallas_kernels.token_experts.api import experts, experts_in_codes

__all__ = ["experts", "experts_in_codes"]
