"""A base model for reinforcement learning on two CPU cores: a V3 of 0.2M parameters that has read noisy sums.

It reads answers to the built-in problems (`deepseek_jax/rl/sums.py`): most without a thought and hardly better than
chance, a fifth with a thought that makes them right. `deepseek-jax rl` trains it in `base` of its workdir, in about a
minute, and then improves it (`tiny_zero`).

    deepseek-jax rl
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3


def get_config() -> ConfigDict:
    """Returns the base of `tiny_zero`."""
    config = tiny_v3.get_config()
    config.name = "tiny_sums"

    m = config.model
    m.d_model, m.n_layers, m.dense_width = 64, 2, 192
    m.q_rank = m.kv_rank = 32
    m.nope_width = m.rope_width = m.value_width = 16
    m.n_experts, m.expert_width, m.top_k, m.n_groups, m.top_groups = 8, 64, 2, 1, 1
    m.mtp_depth = 0
    m.init_std = 0.1  # about 1 / sqrt(d_model); with 0.02 the sums are learnt later
    m.rope_base = 100.0  # for sequences of some 25 tokens

    config.data.format = "conversations"
    config.data.chat_template = "r1"
    config.data.seq_len = 60
    config.data.mask_documents = True
    config.data.fim_rate = 0.0

    config.loop.steps = 800
    config.loop.log_every = 100
    config.loop.eval_every = 400
    config.checkpoint.every = 400
    config.batch.size = 32
    config.run.unroll = 1
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    config.loss.mtp_weight_switch = 1_000_000_000
    config.loss.balance_rate_stop = 640

    schedule = config.schedule
    schedule.peak_rate = 3e-3
    schedule.warmup_steps, schedule.constant_steps, schedule.cosine_steps, schedule.tail_steps = 50, 650, 100, 0
    schedule.tail_rate = schedule.final_rate = 3e-4
    config.optimizer.weight_decay = 0.01
    return config
