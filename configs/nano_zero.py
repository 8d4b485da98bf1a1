"""R1-Zero in miniature with 40,488 parameters: `tiny_zero` with a width of 24, and three times its steps.

On held-out problems the share of right answers at temperature 1 rises from about .25 to above .95 in 120 steps; a step
takes two thirds of the time of one of `tiny_zero`.

    deepseek-jax rl --config=nano_zero
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_zero


def get_config() -> ConfigDict:
    """Returns `tiny_zero`, narrower."""
    config = tiny_zero.get_config()
    config.name = "nano_zero"

    m = config.model
    m.d_model, m.dense_width, m.expert_width = 24, 72, 24
    m.q_rank = m.kv_rank = 12
    m.nope_width = m.value_width = 6

    config.loop.steps = 120
    return config
