"""DeepSeek-R1, first stage of reinforcement learning: reasoning, after a cold start.

Paper: arXiv 2501.12948, section 2.3 and its supplement: rate 3e-6, KL weight 0.001, clip 10, temperature 1, 32
questions x 16 answers of at most 32,768 tokens per update, rollouts of 8,192 answers for 16 updates each, the reference
renewed every 400 updates; the share of the thought's words in the language of the question is added to the reward. It
begins with V3's base model after supervised fine-tuning on some thousand long thoughts.

    deepseek-jax rl --config=r1_stage1 --config.run.init_from=RUN --config.rl.problems=FILES
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_zero


def get_config() -> ConfigDict:
    """Returns the published recipe; the number of its steps is not given, R1-Zero's stands here."""
    config = r1_zero.get_config()
    config.name = "r1_stage1"
    config.rl.rewards.language = 1.0
    return config
