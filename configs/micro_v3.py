"""An 8M-parameter V3 for comparing training speed on a CPU with other implementations of the same sizes.

deepseek-jax bench train --config=micro_v3
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3


def get_config() -> ConfigDict:
    """Vocabulary 4,096, width 256, 4 layers of which 1 dense, 16 experts top-4; 4 sequences of 256 tokens per step."""
    config = tiny_v3.get_config()
    config.name = "micro_v3"

    m = config.model
    m.vocab_size = 4096
    m.d_model = 256
    m.dense_width = 512
    m.q_rank = 96
    m.kv_rank = 64
    m.expert_width = 128
    m.n_groups = 1
    m.top_groups = 1
    m.mtp_depth = 0

    config.data.seq_len = 256
    config.batch.size = 4
    return config
