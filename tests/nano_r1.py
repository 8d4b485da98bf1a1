"""The chain of `tiny_r1` with models that learn next to nothing, in a few steps per stage."""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_r1

WIDTHS = ("d_model", "dense_width", "expert_width", "q_rank", "kv_rank", "nope_width", "rope_width", "value_width")


def get_config() -> ConfigDict:
    """Returns a chain whose programs are few: all networks are equal, all stages of a kind train alike."""
    config = tiny_r1.get_config()
    m = config.model
    for key in WIDTHS:
        m[key] = 16
    m.n_heads, m.n_experts = 2, 4
    rl = config.rl
    rl.questions, rl.answers, rl.eval_problems = 8, 4, 32
    config.sample.problems = 48
    config.sample.least.accuracy = config.sample.least.format = 0.0

    r1 = config.r1
    r1.student_base.model = ConfigDict()
    r1.base.schedule.warmup_steps = r1.student_base.schedule.warmup_steps = 5
    r1.second.rl.temperature = 1.0
    steps = {"base": 60, "cold": 12, "first": 4, "sft": 12, "second": 2, "student_base": 4, "student": 12}
    for stage, n_steps in (steps | {"student_zero": 2}).items():
        r1[stage].loop.steps, r1[stage].loop.log_every, r1[stage].loop.eval_every = n_steps, 1, 0
        r1[stage].checkpoint.every = max(n_steps // 4, 1)
    for stage in ("cold", "sft", "student"):
        r1[stage].schedule.cosine_steps = 12
        r1[stage].loss.balance_rate_stop = 12
    return config
