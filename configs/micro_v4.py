"""`micro_v3` with V4's layers, for comparing training speed on a CPU: streams, windows, both compressors, hash routing.

deepseek-jax bench train --config=micro_v4
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v4


def get_config() -> ConfigDict:
    """Width 256, 5 layers with entries of no, no, 4, 128 and 4 tokens, 16 experts top-4; 4 sequences of 256 tokens."""
    config = tiny_v4.get_config()
    config.name = "micro_v4"

    m = config.model
    m.vocab_size = 4096
    m.d_model = 256
    m.compress_ratios = (0, 0, 4, 128, 4)
    m.n_hash_layers = 3
    m.q_rank = 96
    m.head_width, m.rope_width = 32, 16
    m.out_groups, m.out_rank = 4, 16
    m.index_heads, m.index_width, m.index_top_k = 4, 32, 16
    m.expert_width = 128
    m.mtp_depth = 0

    config.batch.size = 4
    config.optimizer.method = "adamw"  # as the others have it
    return config
