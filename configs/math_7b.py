"""DeepSeekMath 7B: the network of DeepSeek LLM 7B, trained further on mathematics.

Paper: arXiv 2402.03300, section 2.3: from DeepSeek-Coder-v1.5 7B, 500B tokens, batch 10M tokens, learning rate 4.2e-4.

    deepseek-jax inspect --config=math_7b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import llm_7b


def get_config() -> ConfigDict:
    """The published sizes; of the recipe what the paper gives."""
    config = llm_7b.get_config()
    config.name = "math_7b"

    config.loop.steps = 50_029  # 500B tokens
    config.batch.size = 2440  # 10M tokens

    schedule = config.schedule
    schedule.constant_steps = 38_023  # to 80 %
    schedule.tail_steps = 5_003  # to 90 %
    return config
