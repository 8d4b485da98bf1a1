"""The smallest V3 with every mechanism, for tests that start whole runs; the corpus is given on the command line."""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3


def get_config() -> ConfigDict:
    """Two layers of width 32, eight experts, 8 sequences of 32 tokens a step."""
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

    train = config.train
    train.steps = 60
    train.batch_size = train.batch_size_start = 8
    train.log_every = 1
    train.eval_every = 7
    train.eval_batches = 2

    optimizer = config.optimizer
    optimizer.warmup_steps = 10
    optimizer.constant_steps = 30
    optimizer.cosine_steps = 10
    optimizer.tail_steps = 5

    config.checkpoint.every = 3
    return config
