"""DeepSeek-R1, second stage of reinforcement learning: all kinds of questions, after fine-tuning on 800K answers.

Paper: arXiv 2501.12948, section 2.3 and its supplement: as the first stage, at temperature 0.7, 1,700 updates. The
paper mixes rules for reasoning with reward models for general questions, the latter in the last 400 updates only; here
rules alone score.

    deepseek-jax rl --config=r1_stage2 --config.run.init_from=RUN --config.rl.problems=FILES
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_stage1


def get_config() -> ConfigDict:
    """Returns the published recipe, of which a step of ours is 16 updates."""
    config = r1_stage1.get_config()
    config.name = "r1_stage2"
    config.rl.temperature = 0.7
    config.loop.steps = 106
    return config
