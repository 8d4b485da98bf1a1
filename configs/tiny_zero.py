"""R1-Zero in miniature: GRPO on `tiny_sums`, rewarded for right answers alone.

On held-out problems the share of right answers at temperature 1 rises from about .25 to above .9 in 40 steps, and the
answers grow: most begin without a thought, in the end all have one, though nothing rewards thoughts or length. A step
draws 128 answers and takes .3 CPU-seconds; with its base the run takes a few minutes on two cores.

    deepseek-jax rl
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_sums


def get_config() -> ConfigDict:
    """Returns the twin of `r1_zero` for two CPU cores."""
    config = tiny_sums.get_config()
    config.name = "tiny_zero"

    config.rl.problems = "sums:6"
    config.rl.longest_prompt = 9
    config.rl.longest_answer = 16
    config.rl.grpo.advantage = "std"

    config.loop.steps = 40
    config.loop.log_every = 1
    config.loop.eval_every = 20
    config.checkpoint.every = 20
    config.loss.balance_rate = 0.0

    schedule = config.schedule
    schedule.peak_rate = schedule.tail_rate = schedule.final_rate = 1e-3
    schedule.warmup_steps, schedule.constant_steps, schedule.cosine_steps = 0, 1_000_000_000, 0
    config.optimizer.weight_decay = 0.0
    return config
