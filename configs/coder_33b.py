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

    config.loop.steps = 127_157  # 2T tokens
    config.batch.size = 3840

    schedule = config.schedule
    schedule.peak_rate = 3.5e-4
    schedule.constant_steps = 99_726
    schedule.tail_rate = 1.107e-4
    schedule.tail_steps = 12_716
    schedule.final_rate = 3.5e-5
    return config
