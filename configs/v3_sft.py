"""V3's supervised fine-tuning, on 1.5M conversations.

Paper: arXiv 2412.19437, section 5.1: two epochs, rate 5e-6 to 1e-6 along a cosine, conversations packed into sequences
and masked from one another. Length and batch are not given: 32,768 tokens and 128 sequences here, as R1 has them. Set
loop.steps and schedule.cosine_steps to two epochs of your conversations.

    deepseek-jax sft --config=v3_sft --config.run.init_from=deepseek-ai/DeepSeek-V3-Base --config.data.source=FILES
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_sft


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = r1_sft.get_config()
    config.name = "v3_sft"
    config.data.chat_template = "v3"
    config.loop.steps = config.schedule.cosine_steps = 23_438  # 1.5M conversations twice, if each fills a sequence
    config.schedule.peak_rate, config.schedule.tail_rate, config.schedule.final_rate = 5e-6, 1e-6, 1e-6
    return config
