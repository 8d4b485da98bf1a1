"""DeepSeek LLM 67B: 8 key-value heads, 95 layers, 67.4B parameters.

Paper: arXiv 2401.02954, table 2: 2T tokens, batch 4,608, learning rate 3.2e-4.  300.6K H800 hours per trillion tokens
(V2 report, section 3.2.3).

    deepseek-jax plan --config=llm_67b --chip=h800 --devices=1024 --config.mesh.pipe=16
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import llm_7b


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = llm_7b.get_config()
    config.name = "llm_67b"

    m = config.model
    m.d_model = 8192
    m.n_layers = 95
    m.dense_width = 22_016
    m.n_heads = 64
    m.n_kv_heads = 8

    config.loop.steps = 105_964  # 2T tokens
    config.batch.size = 4608

    schedule = config.schedule
    schedule.peak_rate = 3.2e-4
    schedule.constant_steps = 82_771  # to 80 %
    schedule.tail_rate = 1.011e-4  # 3.2e-4 * 0.316
    schedule.tail_steps = 10_596  # to 90 %
    schedule.final_rate = 3.2e-5
    return config
