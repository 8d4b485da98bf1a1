"""A DeepSeekMoE small enough for two CPU cores: 16 experts, 4 active per token, balanced by a loss.

Learns CPython's standard library byte by byte, as `tiny_v3` does: 420 steps end at 2.63 bits per byte of held-out text.

    deepseek-jax train --config=tiny_moe
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import moe_16b, tiny_v3


def get_config() -> ConfigDict:
    """Returns the laptop twin of `moe_16b`."""
    config = moe_16b.get_config()
    config.name = "tiny_moe"

    m = config.model
    m.vocab_size = 272  # 256 bytes and the special tokens
    m.d_model = 128
    m.n_layers = 4
    m.dense_width = 384
    m.n_heads = 4
    m.n_kv_heads = 4
    m.head_width = 32
    m.n_experts = 16
    m.expert_width = 64
    m.top_k = 4
    m.init_std = 0.02

    config.loss.auxiliary.expert_balance = 0.01
    return tiny_v3.recipe(config)
