"""R1 in miniature: the whole chain, with a V3 of 0.2M parameters and a student of 0.04M, on two CPU cores.

Paper: arXiv 2501.12948, section 2.3: cold start, reinforcement learning for right and well-formed answers in one
language, rejection sampling, fine-tuning of the base on what is kept, reinforcement learning at temperature 0.7; and
section 2.4, distillation. The problems are the built-in sums. It takes about seven minutes; BENCHMARKS.md has the
figures of three seeds.

    deepseek-jax r1
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import nano_zero, tiny_sft, tiny_sums, tiny_zero


def get_config() -> ConfigDict:
    """Returns the config that all stages share, and what each changes of it."""
    config = tiny_zero.get_config()
    config.name = "tiny_r1"
    config.rl.rewards.format = 1.0
    config.rl.rewards.language = 1.0
    config.sample.answers = 2

    r1 = config.r1
    r1.base = recipe(tiny_sums.get_config())
    r1.cold = fine_tuning(steps=12)
    r1.cold.data.source = "sums:6"
    r1.first = recipe(config)
    r1.kept = ConfigDict()
    r1.sft = fine_tuning(steps=120)
    r1.second = recipe(config)
    r1.second.loop.steps = 20
    schedule = r1.second.schedule  # nearly all answers are right when it begins
    schedule.peak_rate = schedule.tail_rate = schedule.final_rate = 1e-4
    r1.second.rl = ConfigDict({"temperature": 0.7})

    r1.student_base = recipe(tiny_sums.get_config())
    r1.student_base.model = nano_zero.get_config().model
    r1.student = fine_tuning(steps=100)
    r1.student_zero = recipe(config)
    r1.student_zero.loop.steps = 120
    r1.student_zero.rl = ConfigDict({"rewards": {"language": 0.0}})
    return config


def recipe(config: ConfigDict) -> ConfigDict:
    """Returns how a config trains, apart from its network and data."""
    groups = ("run", "loop", "batch", "loss", "schedule", "optimizer", "checkpoint")
    return ConfigDict({name: config[name].copy_and_resolve_references() for name in groups})


def fine_tuning(steps: int) -> ConfigDict:
    """Returns how a stage is fine-tuned: the rate falls along a cosine to a tenth."""
    changes = recipe(tiny_sft.get_config())
    changes.data = ConfigDict({"source": "stdlib"})  # that of the stage before, or set
    changes.loop.steps, changes.loop.log_every, changes.loop.eval_every = steps, 10, steps
    changes.checkpoint.every = steps
    changes.loss.balance_rate_stop = steps
    schedule = changes.schedule
    schedule.warmup_steps, schedule.constant_steps, schedule.cosine_steps = 0, 0, steps
    return changes
