"""Small matrices made doubly stochastic, one per token: how DeepSeek-V4 mixes the streams of its hyper-connections.

doubly_stochastic   the public function: checks its arguments, calls the implementation that is named
reference.py        the definition, in plain jax.numpy
gpu.py              the same in one pass for NVIDIA GPUs: Pallas Triton
"""

from pallas_kernels.sinkhorn.api import doubly_stochastic

__all__ = ["doubly_stochastic"]
