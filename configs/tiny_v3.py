"""A V3 small enough for two CPU cores: every mechanism of the report, 16 experts of which 4 work on a token.

Learns CPython's standard library byte by byte: held-out bits per byte fall from about 8 to below 3 within five minutes.

    deepseek-jax train --config=tiny_v3
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b


def get_config() -> ConfigDict:
    """Returns the laptop twin of `v3_671b`."""
    config = v3_671b.get_config()
    config.name = "tiny_v3"
    config.precision = "fp32"

    m = config.model
    m.vocab_size = 272  # 256 bytes and the special tokens
    m.d_model = 128
    m.n_layers = 4
    m.n_dense_layers = 1
    m.dense_width = 384
    m.n_heads = 4
    m.q_rank = 64
    m.kv_rank = 32
    m.nope_width = 32
    m.rope_width = 16
    m.value_width = 32
    m.n_experts = 16
    m.expert_width = 64
    m.top_k = 4
    m.n_groups = 4
    m.top_groups = 2
    m.init_std = 0.02

    data = config.data
    data.source = "stdlib"
    data.tokenizer = "bytes"
    data.seq_len = 256

    train = config.train
    train.steps = 420  # 860,000 bytes
    train.batch_size_start = train.batch_size = 8
    train.batch_ramp_steps = 0
    train.remat = "none"
    train.unroll = 3
    train.mtp_weight_switch = 300
    train.balance_rate = 1e-2
    train.balance_rate_stop = 400
    train.eval_every = 100

    optimizer = config.optimizer
    optimizer.peak_rate = 3e-3
    optimizer.warmup_steps = 50
    optimizer.constant_steps = 200
    optimizer.cosine_steps = 150
    optimizer.tail_rate = 3e-4
    optimizer.tail_steps = 20
    optimizer.final_rate = 1e-4
    optimizer.moments_dtype = "float32"

    config.checkpoint.every = 100
    return config
