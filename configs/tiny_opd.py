"""On-policy distillation in miniature: a student of 40,488 parameters learns from a teacher of 0.2M.

The student (`nano_zero` and its base) draws answers to the built-in sums; the teacher, such as a run of `tiny_zero`,
says of each token how likely it is, and that is all that is learnt from: no reward is. The divergence from the teacher
falls and the share of right answers rises with it, up to the teacher's.

    deepseek-jax rl                                                       # the teacher: runs/tiny_zero
    deepseek-jax rl --config=tiny_opd --config.rl.teacher=runs/tiny_zero
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import nano_zero


def get_config() -> ConfigDict:
    """Returns `nano_zero` with a teacher in place of rewards."""
    config = nano_zero.get_config()
    config.name = "tiny_opd"
    config.rl.teacher = "runs/tiny_zero"

    config.loop.steps = 120
    config.schedule.cosine_steps = config.loop.steps * config.rl.updates  # rates are of updates
    config.schedule.constant_steps = 0
    config.schedule.peak_rate = 2e-3
    config.schedule.tail_rate = config.schedule.final_rate = 2e-4
    return config
