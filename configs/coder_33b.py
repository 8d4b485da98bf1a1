"""DeepSeek-Coder 33B: 8 key-value heads.

Paper: arXiv 2401.14196, table 2: batch 3,840, learning rate 3.5e-4; sizes from the released config.json.

    deepseek-jax inspect --config=coder_33b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import coder_1b3


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = coder_1b3.get_config()
    config.name = "coder_33b"

    m = config.model
    m.d_model = 7168
    m.n_layers = 62
    m.dense_width = 19_200
    m.n_heads = 56
    m.n_kv_heads = 8

    train = config.train
    train.steps = 127_157  # 2T tokens
    train.batch_size_start = train.batch_size = 3840

    optimizer = config.optimizer
    optimizer.peak_rate = 3.5e-4
    optimizer.constant_steps = 99_726
    optimizer.tail_rate = 1.107e-4
    optimizer.tail_steps = 12_716
    optimizer.final_rate = 3.5e-5
    return config
