"""The smallest V3 with every mechanism, for tests that start whole runs; the corpus is given on the command line."""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3


def get_config() -> ConfigDict:
    """Two layers of width 32, eight experts, 8 sequences of 32 tokens per step."""
    config = tiny_v3.get_config()
    m = config.model
    m.d_model = 32
    m.n_layers = 2
    m.dense_width = 48
    m.n_heads = 2
    m.q_rank = m.kv_rank = 16
    m.nope_width = m.rope_width = m.value_width = 8
    m.n_experts = 8
    m.expert_width = 16
    m.top_k = 2

    config.data.seq_len = 32
    config.data.holdout_rate = 0.1

    config.loop.steps = 60
    config.batch.size = config.batch.size_start = 8
    config.loop.log_every = 1
    config.loop.eval_every = 7
    config.loop.eval_batches = 2

    schedule = config.schedule
    schedule.warmup_steps = 10
    schedule.constant_steps = 30
    schedule.cosine_steps = 10
    schedule.tail_steps = 5

    config.checkpoint.every = 3
    return config
