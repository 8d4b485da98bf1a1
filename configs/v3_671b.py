"""DeepSeek-V3, 671B parameters, of which 37B are active per token.

Paper: arXiv 2412.19437, section 4.2.  14.8T tokens of 4,096-token sequences, batch 3,072 -> 15,360 over the first 469B
tokens, 2,664K H800 hours on 2,048 chips (PP16 x EP64). R1 and V3.1 share these sizes.

    deepseek-jax inspect --config=v3_671b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "v3_671b"
    config.family = "v3"
    config.precision = "bf16"

    m = config.model
    m.vocab_size = 129_280
    m.d_model = 7168
    m.n_layers = 61
    m.n_dense_layers = 3
    m.dense_width = 18_432
    m.n_heads = 128
    m.q_rank = 1536
    m.kv_rank = 512
    m.nope_width = 128
    m.rope_width = 64
    m.value_width = 128
    m.rope_base = 10_000.0
    m.yarn = ConfigDict()  # none in pre-training; section 4.3 extends to 128K afterwards
    m.n_experts = 256
    m.n_shared_experts = 1
    m.expert_width = 2048
    m.top_k = 8
    m.n_groups = 8
    m.top_groups = 4
    m.route_scale = 2.5
    m.mtp_depth = 1
    m.norm_eps = 1e-6
    m.init_std = 0.006

    data = config.data
    data.tokenizer = "tokenizer.json"
    data.source = "corpus/*.array_record"
    data.seq_len = 4096
    data.fim_rate = 0.1

    config.run.remat = "block"
    config.loop.steps = 242_694  # 14.8T tokens

    batch = config.batch
    batch.size_start = 3072
    batch.size = 15_360
    batch.ramp_steps = 14_909  # 469B tokens

    loss = config.loss
    loss.mtp_weight = 0.3
    loss.mtp_weight_final = 0.1
    loss.mtp_weight_switch = 166_400  # 10T tokens
    loss.balance_rate = 1e-3
    loss.balance_rate_stop = 234_747  # 14.3T tokens
    loss.auxiliary.expert_balance = 1e-4

    schedule = config.schedule
    schedule.peak_rate = 2.2e-4
    schedule.warmup_steps = 2000
    schedule.constant_steps = 164_400  # to 10T tokens
    schedule.cosine_steps = 68_347  # 4.3T tokens
    schedule.tail_rate = 2.2e-5
    schedule.tail_steps = 5_293  # 333B tokens
    schedule.final_rate = 7.3e-6  # 167B tokens
    config.optimizer.moments_dtype = "bfloat16"
    return config
