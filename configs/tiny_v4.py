"""A V4 small enough for two CPU cores: every mechanism of the report, 16 experts, 4 active per token.

A layer with a window alone, whose experts a table names, then two each of CSA and HCA; four streams; multi-token
prediction over them.
Held-out bits per byte fall from 7.9 to 2.02 in the steps in which those of `tiny_v3` fall to 2.56 (docs/v4.svg).

    deepseek-jax train --config=tiny_v4
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3, v4_flash_284b


def get_config() -> ConfigDict:
    """Returns the laptop twin of `v4_flash_284b`."""
    config = v4_flash_284b.get_config()
    config.name = "tiny_v4"

    m = config.model
    m.vocab_size = 272  # 256 bytes and the special tokens
    m.d_model = 128
    m.n_layers = 5
    m.compress_ratios = (0, 4, 16, 4, 16, 0)
    m.n_hash_layers = 1
    m.n_heads = 4
    m.head_width = 32
    m.rope_width = 16
    m.q_rank = 64
    m.out_groups = 2
    m.out_rank = 32
    m.window = 32
    m.yarn = ConfigDict()  # texts are as long as in training
    m.index_heads = 4
    m.index_width = 16
    m.index_top_k = 16
    m.n_experts = 16
    m.expert_width = 38  # so that it has as many parameters as tiny_v3, 1.7M
    m.top_k = 4
    m.init_std = 0.02

    config.loss.mtp_weight_switch = 300
    config.loss.balance_rate = 1e-2
    config.loss.balance_rate_stop = 400
    config.data.mask_documents = False
    return tiny_v3.recipe(config)
