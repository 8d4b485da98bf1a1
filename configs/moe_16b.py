"""DeepSeekMoE 16B: 16.4B parameters, of which 2.8B are active per token.

Paper: arXiv 2401.06066, section 5.1: 2T tokens, batch 4,608, learning rate 4.2e-4, balance
factor 0.001, no token dropped.

    deepseek-jax inspect --config=moe_16b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import llm_7b


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = llm_7b.get_config()
    config.name = "moe_16b"
    config.family = "moe"

    m = config.model = ConfigDict()
    m.vocab_size = 102_400
    m.d_model = 2048
    m.n_layers = 28
    m.n_dense_layers = 1
    m.dense_width = 10_944
    m.n_heads = 16
    m.n_kv_heads = 16
    m.head_width = 128
    m.rope_base = 10_000.0
    m.n_experts = 64
    m.n_shared_experts = 2
    m.expert_width = 1408
    m.top_k = 6
    m.route_scale = 1.0
    m.norm_eps = 1e-6
    m.init_std = 0.006

    config.loop.steps = 106_449
    config.batch.size = 4608
    config.loss.auxiliary.expert_balance = 1e-3

    schedule = config.schedule
    schedule.constant_steps = 83_159  # to 80 %
    schedule.tail_steps = 10_645  # to 90 %
    return config
