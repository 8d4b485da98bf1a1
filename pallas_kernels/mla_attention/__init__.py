"""Causal attention for training and prefill, forward and backward, with the sizes of latent attention.

attention       the public function: checks its arguments, calls the implementation that is named
reference.py    the definition, in plain jax.numpy
chunked.py      by blocks of queries and keys, in plain jax: any device, memory linear in the tokens
gpu.py          Hopper: Pallas Mosaic GPU; gpu_forward.py and gpu_backward.py are its kernels
tpu.py          TPUs: Pallas Mosaic TPU; tpu_forward.py and tpu_backward.py are its kernels, tpu_pairs.py is for both
visits.py       which blocks of the other sequence a tile visits, and which processor computes which tiles
"""

from pallas_kernels.mla_attention.api import SAVED, attention, implementation

__all__ = ["SAVED", "attention", "implementation"]
