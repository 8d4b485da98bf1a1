"""DeepSeek-V4-Pro, 1.6T parameters, of which 49B are active per token: the larger V4, for a million tokens.

Paper: arXiv 2606.19348, section 4.2.1; layers and widths as in copies of its config.json. 33T tokens; 4K tokens long,
then 16K, 64K and 1M. Here are the sizes, at a length of 4,096.

    deepseek-jax plan --config=v4_pro_1t6
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v4_flash_284b


def get_config() -> ConfigDict:
    """The published sizes and recipe, without the first trillion tokens, in which attention is dense."""
    config = v4_flash_284b.get_config()
    config.name = "v4_pro_1t6"

    m = config.model
    m.d_model = 7168
    m.n_layers = 61
    m.compress_ratios = (128, 128, 4, *(128, 4) * 29, 0)
    m.n_heads = 128
    m.q_rank = 1536
    m.out_groups = 16
    m.index_top_k = 1024
    m.n_experts = 384
    m.expert_width = 3072
    m.route_scale = 2.5

    config.batch.size = 23_040  # sequences of 94.4M tokens
    config.loop.steps = 350_000  # 33T tokens
    config.schedule.constant_steps = 298_000
    config.loss.mtp_weight_switch = 300_000
    config.schedule.peak_rate = 2.0e-4
    config.schedule.tail_rate = 2.0e-5
    config.schedule.final_rate = 2.0e-5
    return config
