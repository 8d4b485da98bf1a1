"""DeepSeek-Coder 6.7B.

Paper: arXiv 2401.14196, table 2: batch 2,304, learning rate 4.2e-4; sizes from the released config.json.

    deepseek-jax inspect --config=coder_6b7
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import coder_1b3


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = coder_1b3.get_config()
    config.name = "coder_6b7"

    m = config.model
    m.d_model = 4096
    m.n_layers = 32
    m.dense_width = 11_008
    m.n_heads = 32
    m.n_kv_heads = 32

    train = config.train
    train.steps = 211_928  # 2T tokens
    train.batch_size_start = train.batch_size = 2304

    optimizer = config.optimizer
    optimizer.peak_rate = 4.2e-4
    optimizer.constant_steps = 167_542
    optimizer.tail_rate = 1.328e-4
    optimizer.tail_steps = 21_193
    optimizer.final_rate = 4.2e-5
    return config
