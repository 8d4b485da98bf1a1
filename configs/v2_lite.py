"""DeepSeek-V2-Lite, 15.7B parameters, of which 2.4B are active per token; Coder-V2-Lite shares these sizes.

Paper: arXiv 2405.04434, appendix B: 5.7T tokens, batch 4,608, learning rate 4.2e-4, balance factor 0.001. Queries
without a latent, no groups.

    deepseek-jax inspect --config=v2_lite
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v2_236b


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = v2_236b.get_config()
    config.name = "v2_lite"

    m = config.model
    m.d_model = 2048
    m.n_layers = 27
    m.dense_width = 10_944
    m.n_heads = 16
    m.q_rank = 0  # queries straight from the stream
    m.n_experts = 64
    m.expert_width = 1408
    m.n_groups = 1
    m.top_groups = 1
    m.route_scale = 1.0

    config.loop.steps = 301_998  # 5.7T tokens
    config.batch.size = 4608
    config.batch.ramp_steps = 0
    config.loss.auxiliary.expert_balance = 0.001
    config.loss.auxiliary.device_balance = config.loss.auxiliary.communication_balance = 0.0

    schedule = config.schedule
    schedule.peak_rate = 4.2e-4
    schedule.constant_steps = 239_598  # to 80 %
    schedule.tail_rate = 1.327e-4
    schedule.tail_steps = 30_200  # to 90 %
    schedule.final_rate = 4.2e-5
    return config
