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

    config.loop.steps = 211_928  # 2T tokens
    config.batch.size = 2304

    schedule = config.schedule
    schedule.peak_rate = 4.2e-4
    schedule.constant_steps = 167_542
    schedule.tail_rate = 1.328e-4
    schedule.tail_steps = 21_193
    schedule.final_rate = 4.2e-5
    return config
